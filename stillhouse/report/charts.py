"""The charts of blocks as inline SVG, with ticks and labels as HTML around it.

Marks are drawn in a square of 1000 x 1000 units that the page stretches over the plot's box;
ticks and labels are placed in percent, so that text keeps its size on a phone. Colours are
classes of the style sheet: `pool`, `kept` and those of lines.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from markupsafe import Markup

from stillhouse.report.blocks import Cells, Curves, Histogram, Points
from stillhouse.report.formatting import NARROW, compact, decimals, minus, visible, words

SIZE = 1000
TAIL = 0.001
"""Share of the counts that may lie outside of an axis at either end."""
LEVELS = 7
LABEL_GAP = 6.0
"""Least distance of two labels at the right, in percent of the plot's height."""
NUM_PATTERNS = 8
FAINT = "faint"
"""Lines that are drawn without a name: there are more than can be told apart."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis from `low` to `high`."""

    low: float
    high: float

    def unit(self, value: float) -> float:
        """Position of `value`: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> int:
        """Horizontal coordinate of `value`."""
        return round(SIZE * self.unit(value))

    def y(self, value: float) -> int:
        """Vertical coordinate of `value`, upwards."""
        return SIZE - self.x(value)

    def ticks(self, at_most: int) -> list[float]:
        """Round values inside the axis, at most `at_most` of them, a step of 1, 2 or 5 x 10^n."""
        span = self.high - self.low
        steps = (base * 10.0**power for power in range(-12, 16) for base in (1, 2, 5))
        step = next(step for step in steps if span / step <= at_most - 1)
        first, last = -int(-self.low // step), int(self.high // step)
        return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Frame:
    """The box around a chart: its two axes with their titles."""

    across: Axis
    up: Axis
    x_title: str
    y_title: str

    def draw(self, marks: Markup, labels: Markup, description: str, kind: str = "") -> Markup:
        """The whole chart: gridlines, `marks`, ticks, titles and further `labels`."""
        x_ticks, y_ticks = self.across.ticks(7), self.up.ticks(6)
        grid = Markup("").join(
            _line("grid", [(0, self.up.y(tick)), (SIZE, self.up.y(tick))]) for tick in y_ticks
        )
        svg = Markup(
            '<svg viewBox="0 0 {0} {0}" preserveAspectRatio="none" role="img" aria-label="{1}">'
            "{2}{3}</svg>"
        ).format(SIZE, visible(description), grid, marks)
        ticks = _ticks("x", "left", self.across, x_ticks, 0)
        ticks += _ticks("y", "top", self.up, y_ticks, 100)
        titles = Markup('<span class="yt">{}</span><span class="xt">{}</span>').format(
            self.y_title, self.x_title
        )
        return Markup('<div class="plot {}">{}{}{}{}</div>').format(
            kind, svg, ticks, titles, labels
        )


def histogram(data: Histogram) -> Markup:
    """Sequences by score: the pool as a grey area, the kept ones over it, the cut as a line."""
    first, last = _core(data.pool)
    width = _bins_in_one(last + 1 - first, sum(data.pool))
    edges = [*data.edges[first : last + 1 : width], data.edges[last + 1]]
    pool, kept = (
        [sum(counts[i : min(i + width, last + 1)]) for i in range(first, last + 1, width)]
        for counts in (data.pool, data.kept)
    )
    across, up = Axis(edges[0], edges[-1]), Axis(0, 1.06 * max(1, *pool))
    marks = _area("pool", across, up, edges, pool)
    marks += _area("kept", across, up, edges, kept)
    labels = Markup("")
    if data.cut is not None and across.low <= data.cut <= across.high:
        marks += _line("cut", [(across.x(data.cut), 0), (across.x(data.cut), SIZE)])
        unit = across.unit(data.cut)
        labels = Markup('<span class="cutlabel {}" style="left:{:.2f}%">cut {}</span>').format(
            "before" if unit > 0.6 else "after", 100 * unit, decimals(data.cut, 3)
        )
    outside = sum(data.pool) - sum(pool)
    note = f"; {compact(outside)} further out are not drawn" if outside else ""
    frame = Frame(across, up, f"score{data.unit}{note}", "sequences")
    return frame.draw(marks, labels, "Histogram of scores over the pool and the selection")


def cells(data: Cells) -> Markup:
    """Sequences by prior and conditional loss; cells mostly kept are coloured, darker is more."""
    x_first, x_last = _core([sum(column) for column in data.pool])
    y_first, y_last = _core([sum(row) for row in zip(*data.pool, strict=True)])
    across = Axis(data.edges[x_first], data.edges[x_last + 1])
    up = Axis(data.edges[y_first], data.edges[y_last + 1])
    shown = ((x, y) for x in range(x_first, x_last + 1) for y in range(y_first, y_last + 1))
    marks = _cells(data, shown, across, up)
    ends = (across.low, across.high)
    marks += _line("even", [(across.x(x), up.y(x)) for x in ends])
    if data.cut is not None:
        marks += _line("cut", [(across.x(x), up.y(x - data.cut)) for x in ends])
    frame = Frame(across, up, "prior loss, nats per token; dotted: no change", "conditional loss")
    return frame.draw(marks, Markup(""), "Sequences by prior and conditional loss")


def curves(data: Curves) -> Markup:
    """Means over the seeds with bands, the main one on top, and the names at their ends."""
    groups = {name: _by_place(seeds) for name, seeds in data.curves.items()}
    end = max(x for group in groups.values() for x in group)
    across = Axis(0, max(end, 1))
    settled = [
        value
        for group in groups.values()
        for x, values in group.items()
        if x >= data.settled_from * end or x == max(group)
        for value in values
    ]
    up = _padded(min(settled), max(settled))
    if data.from_zero:
        up = Axis(0, 1.06 * max(*settled, 1e-9))
    others = [name for name in groups if name != data.main]
    most = min(data.num_named, NUM_PATTERNS)
    styles = {name: f"dash{i}" if i < most else FAINT for i, name in enumerate(others)}
    styles[data.main] = "main"
    marks = Markup("").join(
        _line("restart", [(x, 0), (x, SIZE)]) for x in sorted({across.x(x) for x in data.marks})
    )
    layers = {name: (styles[name] != FAINT) + (name == data.main) for name in groups}
    for name in sorted(groups, key=lambda name: layers[name]):
        marks += _curve(styles[name], groups[name], across, up)
    finals = {name: fmean(group[max(group)]) for name, group in groups.items()}
    frame = Frame(across, up, data.x_title, data.y_title)
    labels = _end_labels(finals, styles, up)
    return frame.draw(marks, labels, f"{data.y_title} over {data.x_title}".capitalize(), "curves")


def _ticks(kind: str, side: str, axis: Axis, values: list[float], origin: int) -> Markup:
    """Tick labels at their percentages; `origin` 100 counts from the far end (upwards)."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return Markup("").join(
        Markup('<span class="{}" style="{}:{:.2f}%">{}</span>').format(
            kind, side, abs(origin - 100 * axis.unit(value)), _tick_text(value, step)
        )
        for value in values
    )


def _tick_text(value: float, step: float) -> str:
    if step >= 1:
        number, narrow, unit = minus(compact(round(value))).partition(NARROW)
        return (number.rstrip("0").rstrip(".") if "." in number else number) + narrow + unit
    return decimals(value, next(n for n in range(1, 13) if round(step * 10**n, 6) >= 1))


def _core(counts: Sequence[int]) -> tuple[int, int]:
    """First and last bin once at most a share `TAIL` of the counts is cut off at either end."""
    total = sum(counts)
    sums = list(accumulate(counts))
    first = next((i for i, seen in enumerate(sums) if seen > TAIL * total), 0)
    last = next((i for i, seen in enumerate(sums) if seen >= (1 - TAIL) * total), len(counts) - 1)
    return first, max(first, last)


def _bins_in_one(num_bins: int, total: int) -> int:
    """How many bins to draw as one: at least twice the cube root of the values stay (Rice)."""
    return max(1, int(num_bins / max(2 * total ** (1 / 3), 1)))


def _area(style: str, x: Axis, y: Axis, edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """A filled staircase over the bins."""
    steps = "".join(f"V{y.y(n)}H{x.x(edges[i + 1])}" for i, n in enumerate(counts))
    return Markup('<path class="{}" d="M0 {}{}V{}Z"/>').format(style, SIZE, steps, SIZE)


def _line(style: str, points: Iterable[tuple[int, int]]) -> Markup:
    """A path through points of the square."""
    path = "L".join(f"{x} {y}" for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(style, path)


def _cells(data: Cells, shown: Iterable[tuple[int, int]], across: Axis, up: Axis) -> Markup:
    """One path for each colour and level: the root of the count over its colour's greatest."""
    counts: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for x, y in shown:
        if data.pool[x][y]:
            style = "kept" if 2 * data.kept[x][y] >= data.pool[x][y] else "pool"
            counts[style].append((data.pool[x][y], x, y))
    paths: defaultdict[tuple[str, int], str] = defaultdict(str)
    for style, found in counts.items():
        most = max(count for count, _, _ in found)
        for count, x, y in found:
            left, right = across.x(data.edges[x]), across.x(data.edges[x + 1])
            bottom, top = up.y(data.edges[y]), up.y(data.edges[y + 1])
            level = max(1, round(LEVELS * (count / most) ** 0.5))
            paths[style, level] += f"M{left} {bottom}H{right}V{top}H{left}Z"
    return Markup("").join(
        Markup('<path class="{} level" fill-opacity="{:.2f}" d="{}"/>').format(
            style, 0.12 + 0.88 * level / LEVELS, path
        )
        for (style, level), path in sorted(paths.items())
    )


def _by_place(seeds: Sequence[Points]) -> dict[float, list[float]]:
    """x -> the values of all seeds there."""
    group: dict[float, list[float]] = {}
    for x, value in (point for points in seeds for point in points):
        group.setdefault(x, []).append(value)
    return group


def _curve(style: str, group: dict[float, list[float]], across: Axis, up: Axis) -> Markup:
    points = sorted(group.items())
    marks = Markup("")
    if any(len(values) > 1 for _, values in points):
        above = [(across.x(x), up.y(max(values))) for x, values in points]
        below = [(across.x(x), up.y(min(values))) for x, values in reversed(points)]
        marks += _line(f"band {style}", above + below)
    middle = [(across.x(x), up.y(fmean(values))) for x, values in points]
    return marks + _line(f"line {style}", middle)


def _end_labels(finals: dict[str, float], styles: dict[str, str], up: Axis) -> Markup:
    """Names at the right ends of their lines, pushed apart where they would overlap."""
    names = sorted((n for n in finals if styles[n] != FAINT), key=lambda name: -finals[name])
    places = _spread_out([100 - 100 * up.unit(finals[name]) for name in names])
    label = Markup(
        '<span class="end {0}" style="top:{1:.2f}%"><svg viewBox="0 0 20 4">'
        '<path class="line {0}" d="M0 2H20"/></svg><bdi>{2}</bdi></span>'
    )
    return Markup("").join(
        label.format(styles[name], place, visible(words(name)))
        for name, place in zip(names, places, strict=True)
    )


def _spread_out(places: list[float]) -> list[float]:
    """Ascending places moved so that neighbours are `LABEL_GAP` apart, and none below 100."""
    spread: list[float] = []
    for place in places:
        spread.append(max(place, spread[-1] + LABEL_GAP) if spread else place)
    limit = 100.0
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], limit)
        limit = spread[index] - LABEL_GAP
    return spread


def _padded(low: float, high: float) -> Axis:
    """An axis with a little room at both ends."""
    margin = 0.06 * (high - low) or 0.5
    return Axis(low - margin, high + margin)
