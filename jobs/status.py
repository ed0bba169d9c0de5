"""`stillhouse status` and `report`: a run is read from its store alone."""

from typing import Any

from jobs.outcome import write_report
from stillhouse.errors import ArtifactError
from stillhouse.report.data import from_json
from stillhouse.storage.filesystem import absolute_uri, join, list_names, read_bytes
from stillhouse.storage.run_record import event_files, read_json


def status_of(uri: str) -> dict[str, Any]:
    """The status of a run, or of every run in a store.

    Raises:
        ArtifactError: neither a run nor a store.
    """
    folder = absolute_uri(uri)
    found = read_json(folder, "status.json")
    if found is not None:
        return found | {"uri": folder, "events": len(event_files(folder))}
    runs = list_names(join(folder, "runs"))
    if not runs:
        raise ArtifactError(f"{uri} is neither a run nor a store that holds runs")
    states = [read_json(join(folder, "runs", name), "status.json") for name in runs]
    return {
        "store": folder,
        "runs": [
            state or {"run": name, "state": "unknown"}
            for name, state in zip(runs, states, strict=True)
        ],
    }


def draw_report(uri: str) -> str:
    """Render a run's stored report data again; the URI of the page.

    Raises:
        ArtifactError: the run has no report (it is not finished, or no run).
    """
    folder = absolute_uri(uri)
    try:
        data = from_json(read_bytes(join(folder, "report.json")))
    except FileNotFoundError:
        raise ArtifactError(f"{uri} has no report yet: see `stillhouse status {uri}`") from None
    except ValueError as error:
        raise ArtifactError(f"{uri}/report.json is broken: {str(error)[:200]}") from None
    return write_report(folder, data)
