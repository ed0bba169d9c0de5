"""What the finished distil jobs of a store made of the same images, for the table of methods."""

from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.pipelines.distill_report import printed_name
from stillhouse.report.distill import OtherSet
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.run_record import read_json


def other_sets(store: Store, images: str, network: str, own_run: str) -> list[OtherSet]:
    """Of every other run on `images` that was judged on `network`, by method and images a class.

    One request a run of the store.
    """
    runs = store.path("runs")
    found: list[OtherSet] = []
    for name in list_names(runs):
        result = None if join(runs, name) == own_run else _result(join(runs, name))
        if result is not None and _compares(result, store.path("images", images), network):
            found.append(_row(result["distill"], network, name))
    return sorted(found, key=lambda one: (one.images_per_class, one.method, one.run))


def _result(run: str) -> dict[str, Any] | None:
    """None where the run has none yet, or a broken one, which is no concern of this job."""
    try:
        return read_json(run, "result.json")
    except ArtifactError:
        return None


def _compares(result: dict[str, Any], images: str, network: str) -> bool:
    made = result.get("distill")
    if made is None or "judged_by" not in made or network not in made["networks"]:
        return False
    return result["artifacts"]["images"] == images


def _row(made: dict[str, Any], network: str, run: str) -> OtherSet:
    accuracy = made["networks"][network]
    return OtherSet(
        printed_name(made["method"]),
        made["images_per_class"],
        made["bytes"],
        accuracy["mean"],
        accuracy["std"],
        made["judged_by"],
        made["seconds"],
        run,
    )
