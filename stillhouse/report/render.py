"""One self-contained HTML page from a report's data: no script, no network.

Texts come from the wild: jinja2 escapes every value, characters that HTML cannot carry are made
visible first, and the page's own policy forbids it to load or run anything.
"""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stillhouse.report import charts, formatting, training_charts
from stillhouse.report.data import BASELINE, ReportData, TargetLossRow, difference, source_shares
from stillhouse.report.heat import heat_plot
from stillhouse.report.mix_data import MixReport
from stillhouse.report.training import TrainingReport
from stillhouse.selection.sources import OTHER

GROUPS = (
    ("best", "The best"),
    ("above", "Just above the cut"),
    ("below", "Just below the cut"),
    ("worst", "The worst"),
)
FILTERS = ("coded", "compact", "day", "decimals", "duration", "flops", "percent", "ratio", "signed")


def render(data: ReportData) -> str:
    """The page, as text to be written in UTF-8."""
    return (
        environment()
        .get_template("select.html.j2")
        .render(
            data=data,
            shares=source_shares(data),
            groups=[
                (name, title, [example for example in data.examples if example.group == name])
                for name, title in GROUPS
            ],
            charts=charts,
            difference=difference,
            other=OTHER,
            main=_target(data, data.main),
            baseline=_target(data, BASELINE),
        )
    )


def render_training(data: TrainingReport) -> str:
    """The page of a train job, as text to be written in UTF-8."""
    template = environment().get_template("train.html.j2")
    return template.render(data=data, charts=training_charts)


def render_mix(data: MixReport) -> str:
    """The page of a mix job."""
    by_name = {row.name: row for row in data.policies}
    return (
        environment()
        .get_template("mix.html.j2")
        .render(
            data=data,
            main=by_name[data.main],
            best=min(data.policies, key=lambda row: row.heldout[0]),
            charts=charts,
            heat_plot=heat_plot,
        )
    )


def _target(data: ReportData, name: str) -> TargetLossRow | None:
    return next((row for row in data.targets if row.name == name), None)


@cache
def environment() -> Environment:
    """The pages' templates; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=formatting.visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(formatting, name)
    return environment
