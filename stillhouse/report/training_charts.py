"""Curves over the tokens of a training, with a mark wherever it began again."""

from collections.abc import Sequence

from markupsafe import Markup

from stillhouse.report.charts import (
    FAINT,
    SIZE,
    Axis,
    Frame,
    draw_line,
    end_labels,
    other_styles,
    padded,
)
from stillhouse.report.training import Points, Start, TrainingReport

NUM_NAMED = 6
"""Sources whose lines are told apart."""
_SETTLED = 0.08  # of the tokens; what comes before would squeeze the rest


def losses(report: TrainingReport) -> Markup:
    """Held-out loss as the main line, the loss of the batches behind it."""
    series = {"trained on": report.loss}
    if report.heldout:
        series["held out"] = report.heldout
    return _chart(series, "held out", report, "loss", "Loss over training tokens")


def by_source(report: TrainingReport) -> Markup:
    """A line for each source that is compared; the largest ones have their names."""
    return _chart(report.compared, "", report, "loss", "Loss of each source over training tokens")


def throughput(report: TrainingReport) -> Markup:
    """Tokens a second, of all workers."""
    series = {"tokens/s": report.tokens_per_s}
    return _chart(series, "tokens/s", report, "tokens a second", "Throughput", from_zero=True)


def waiting(report: TrainingReport) -> Markup:
    """Share of each stretch of time in which the training waited for data."""
    points = [(tokens, 100 * share) for tokens, share in report.data_wait]
    title = "percent of the time"
    return _chart({"waiting": points}, "waiting", report, title, "Waiting", from_zero=True)


def _chart(
    series: dict[str, Points],
    main: str,
    report: TrainingReport,
    y_title: str,
    description: str,
    *,
    from_zero: bool = False,
) -> Markup:
    across = Axis(0, max(report.num_tokens, 1))
    up = _up(series, across, from_zero)
    styles = {main: "main"} | other_styles([n for n in series if n != main], NUM_NAMED)
    marks = _restarts(report.restarts, across)
    layers = {name: (styles[name] != FAINT) + (name == main) for name in series}
    for name, points in sorted(series.items(), key=lambda item: layers[item[0]]):
        drawn = [(across.x(tokens), up.y(min(value, up.high))) for tokens, value in points]
        marks += draw_line(f"line {styles[name]}", drawn)
    finals = {name: points[-1][1] for name, points in series.items()}
    frame = Frame(across, up, "tokens trained on", y_title)
    return frame.draw(marks, end_labels(finals, styles, up), description, "curves")


def _up(series: dict[str, Points], across: Axis, from_zero: bool) -> Axis:
    values = [
        value
        for points in series.values()
        for tokens, value in points
        if tokens >= _SETTLED * across.high or tokens == points[-1][0]
    ]
    return Axis(0, 1.06 * max(*values, 1e-9)) if from_zero else padded(min(values), max(values))


def _restarts(starts: Sequence[Start], across: Axis) -> Markup:
    places = sorted({across.x(start.tokens) for start in starts})
    return Markup("").join(draw_line("restart", [(x, 0), (x, SIZE)]) for x in places)
