"""The pages of reports: written beside a run's record, and drawn again from what stands there."""

from collections.abc import Callable
from typing import Any, TypeAlias

from stillhouse.report import data as selection
from stillhouse.report import distill, training
from stillhouse.report import mix_data as mixing
from stillhouse.report.data import ReportData
from stillhouse.report.distill import DistillReport, render_distill
from stillhouse.report.mix_data import MixReport
from stillhouse.report.render import render, render_mix, render_training
from stillhouse.report.training import TrainingReport
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import join, read_bytes
from stillhouse.storage.run_record import read_json

Report: TypeAlias = ReportData | TrainingReport | MixReport | DistillReport
_READERS: dict[str, Callable[[bytes], Any]] = {
    "select": selection.from_json,
    "train": training.from_json,
    "mix": mixing.from_json,
    "distill": distill.from_json,
}


def write_report(run_uri: str, data: Report, *, page_only: bool = False) -> str:
    """Write `report.json` (unless it stands there) and `report.html`; the URI of the page."""
    if isinstance(data, TrainingReport):
        content, text = training.to_json(data), render_training(data)
    elif isinstance(data, MixReport):
        content, text = mixing.to_json(data), render_mix(data)
    elif isinstance(data, DistillReport):
        content, text = distill.to_json(data), render_distill(data)
    else:
        content, text = selection.to_json(data), render(data)
    if not page_only:
        replace(join(run_uri, "report.json"), content)
    page = join(run_uri, "report.html")
    replace(page, text.encode("utf-8", "replace"))
    return page


def read_report(run_uri: str) -> Report:
    """The report's data of a run.

    Raises:
        FileNotFoundError: there is none yet. ValueError: it is broken.
    """
    status = read_json(run_uri, "status.json") or {"job": "select"}
    return _READERS[status["job"]](read_bytes(join(run_uri, "report.json")))
