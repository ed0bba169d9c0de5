"""The charts of blocks as inline SVG, with ticks and labels as HTML around it.

Marks are drawn in a square of 1000 x 1000 units that the page stretches over the plot's box; ticks
and labels are placed in percent, so that text keeps its size on a phone. Colours are classes of the
style sheet.
"""

import base64
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from markupsafe import Markup

from stillhouse.report.blocks import Cells, Curves, Heat, Histogram, Points
from stillhouse.report.formatting import NARROW, compact, decimals, minus, visible, words

SIZE = 1000
TAIL = 0.001
"""Share of the counts that may lie outside of an axis at either end."""
LEVELS = 7
LABEL_GAP = 6.0
"""Least distance of two labels at the right, in percent of the plot's height."""
NUM_PATTERNS = 8
FAINT = "faint"
"""Style of lines without a name."""
_COPPER = (179, 98, 42)
_LINE_PX = 10
_HEAT_PX = 900
"""Height of a heat map at which rows become thinner than a line of text."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis from `low` to `high`."""

    low: float
    high: float

    def unit(self, value: float) -> float:
        """Position of `value`: 0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> int:
        return round(SIZE * self.unit(value))

    def y(self, value: float) -> int:
        return SIZE - self.x(value)

    def ticks(self, at_most: int) -> list[float]:
        """At most `at_most` round values inside the axis, in steps of 1, 2 or 5 x 10^n."""
        span = self.high - self.low
        steps = (base * 10.0**power for power in range(-12, 16) for base in (1, 2, 5))
        step = next(step for step in steps if span / step <= at_most - 1)
        first, last = -int(-self.low // step), int(self.high // step)
        return [index * step for index in range(first, last + 1)]


def _plot(
    across: Axis,
    up: Axis,
    titles: tuple[str, str],
    marks: Markup,
    labels: Markup,
    description: str,
    kind: str = "",
) -> Markup:
    """A chart: gridlines, `marks`, ticks, titles of x and y, and further `labels`."""
    x_ticks, y_ticks = across.ticks(7), up.ticks(6)
    grid = Markup("").join(_line("grid", [(0, up.y(t)), (SIZE, up.y(t))]) for t in y_ticks)
    svg = Markup(
        '<svg viewBox="0 0 {0} {0}" preserveAspectRatio="none" role="img" aria-label="{1}">'
        "{2}{3}</svg>"
    ).format(SIZE, visible(description), grid, marks)
    ticks = _ticks("x", "left", across, x_ticks, 0) + _ticks("y", "top", up, y_ticks, 100)
    return Markup(
        '<div class="plot {}">{}{}<span class="yt">{}</span><span class="xt">{}</span>{}</div>'
    ).format(kind, svg, ticks, titles[1], titles[0], labels)


def histogram(data: Histogram) -> Markup:
    """Sequences by score: the pool in grey, the kept ones over it, the cut as a line."""
    first, last = _core(data.pool)
    # at least twice the cube root of the values as bins (Rice)
    width = max(1, int((last + 1 - first) / max(2 * sum(data.pool) ** (1 / 3), 1)))
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
    description = "Histogram of scores over the pool and the selection"
    titles = f"score{data.unit}{note}", data.noun
    return _plot(across, up, titles, marks, labels, description)


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
    titles = "prior loss, nats per token; dotted: no change", "conditional loss"
    description = "Sequences by prior and conditional loss"
    return _plot(across, up, titles, marks, Markup(""), description)


def curves(data: Curves) -> Markup:
    """Means over the seeds with bands, the main one on top, and names at their right ends."""
    groups = {name: _by_x(seeds) for name, seeds in data.curves.items()}
    places = [0, *(x for group in groups.values() for x in group)]
    across = Axis(min(places), max(places) if any(places) else 1)
    settled = [
        value
        for group in groups.values()
        for x, values in group.items()
        if across.unit(x) >= data.settled_from or x == max(group)
        for value in values
    ]
    low, high = min(settled), max(settled)
    margin = 0.06 * (high - low) or 0.5
    up = Axis(low - margin, high + margin)
    if data.from_zero:
        up = Axis(0, 1.06 * max(high, 1e-9))
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
    labels = _end_labels(finals, styles, up)
    description = f"{data.y_title} over {data.x_title}".capitalize()
    return _plot(across, up, (data.x_title, data.y_title), marks, labels, description, "curves")


def heat(data: Heat) -> Markup:
    """Rows of names over time as a small image, a pixel a cell, which the page stretches.

    Darker is a larger share, on a root scale up to the largest one. All rows are named where they
    are as high as a line of text, every n-th where there are more.
    """
    count = len(data.names)
    height = max(4.0, min(16.0, _HEAT_PX / count))
    every = max(1, -(-_LINE_PX // int(height)))
    most = max(max(row) for row in data.shares) or 1.0
    names = Markup("").join(
        Markup('<bdi style="top:{:.3f}%" title="{}">{}</bdi>').format(
            100 * (i + 0.5) / count, visible(name), visible(name)
        )
        for i, name in enumerate(data.names)
        if i % every == 0
    )
    rows = [[max(0.0, share / most) ** 0.5 for share in row] for row in data.shares]
    image = base64.b64encode(_png(rows)).decode()
    return Markup(
        '<div class="heat" style="height:{}px"><div class="names">{}</div>'
        '<img alt="Shares of {} over {} steps" src="data:image/png;base64,{}"></div>'
        '<p class="steps"><span>step 1</span><span>{:,}</span></p>'
        '<p class="scale"><span>0</span><i></i><span>{:.1%} of the draws</span>'
        "<span>uniform: {:.1%}</span></p>"
    ).format(round(height * count), names, count, data.num_steps, image, data.num_steps, most,
             1 / count)  # fmt: skip


def _png(rows: Sequence[Sequence[float]]) -> bytes:
    """Cells in [0, 1] as the opacity of copper (RGBA), for any background."""
    pixels = b"".join(
        b"\0" + b"".join(bytes((*_COPPER, round(255 * cell))) for cell in row) for row in rows
    )
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 6, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


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
    """First and last bin when at most a share `TAIL` of the counts is cut off at either end."""
    total = sum(counts)
    sums = list(accumulate(counts))
    first = next((i for i, seen in enumerate(sums) if seen > TAIL * total), 0)
    last = next((i for i, seen in enumerate(sums) if seen >= (1 - TAIL) * total), len(counts) - 1)
    return first, max(first, last)


def _area(style: str, x: Axis, y: Axis, edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """A filled staircase over the bins."""
    steps = "".join(f"V{y.y(n)}H{x.x(edges[i + 1])}" for i, n in enumerate(counts))
    return Markup('<path class="{}" d="M0 {}{}V{}Z"/>').format(style, SIZE, steps, SIZE)


def _line(style: str, points: Iterable[tuple[int, int]]) -> Markup:
    path = "L".join(f"{x} {y}" for x, y in points)
    return Markup('<path class="{}" d="M{}"/>').format(style, path)


def _cells(data: Cells, shown: Iterable[tuple[int, int]], across: Axis, up: Axis) -> Markup:
    """A path for each colour and level: the root of the count over its colour's greatest."""
    counts: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for x, y in shown:
        if data.pool[x][y]:
            style = "kept" if 2 * data.kept[x][y] >= data.pool[x][y] else "pool"
            counts[style].append((data.pool[x][y], x, y))
    paths: defaultdict[tuple[str, int], str] = defaultdict(str)
    for style, of_style in counts.items():
        most = max(count for count, _, _ in of_style)
        for count, x, y in of_style:
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


def _by_x(seeds: Sequence[Points]) -> dict[float, list[float]]:
    """x -> the values of all seeds there."""
    group: defaultdict[float, list[float]] = defaultdict(list)
    for x, value in (point for points in seeds for point in points):
        group[x].append(value)
    return group


def _curve(style: str, group: dict[float, list[float]], across: Axis, up: Axis) -> Markup:
    points = sorted(group.items())
    marks = Markup("")
    if any(len(values) > 1 for _, values in points):
        above = [(across.x(x), up.y(max(values))) for x, values in points]
        below = [(across.x(x), up.y(min(values))) for x, values in reversed(points)]
        marks += _line(f"band {style}", above + below)
    return marks + _line(f"line {style}", [(across.x(x), up.y(fmean(v))) for x, v in points])


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
