"""`stillhouse status` and `report`: runs and artifacts are read from their store alone."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.jobs.publish import history_of, names_of
from stillhouse.report.page import draw, read
from stillhouse.storage.commit import MARKER
from stillhouse.storage.filesystem import absolute_uri, exists, join, list_names
from stillhouse.storage.run_record import DIGESTS, event_files, put_digests, read_status

_POLL_S = 2.0


def status_of(uri: str) -> dict[str, Any]:
    """The status of a run, the history of `STORE#name`, or all that a store holds.

    Raises:
        ArtifactError: neither a run nor a store, or nothing published under the name.
    """
    _, mark, name = uri.rpartition("#")
    if mark and "/" not in name:
        return history_of(uri)
    folder = absolute_uri(uri)
    found = read_status(folder)
    if found is not None:
        return found | {"uri": folder, "events": len(event_files(folder))}
    runs = list_names(join(folder, "runs"))
    if not runs and not exists(join(folder, MARKER)):
        raise ArtifactError(f"{uri} is neither a run nor a store that holds runs")
    states = [read_status(join(folder, "runs", name)) for name in runs]
    return {
        "store": folder,
        "runs": [
            state or {"run": name, "state": "unknown"}
            for name, state in zip(runs, states, strict=True)
        ],
        "names": names_of(folder),
        "artifacts": artifacts_of(folder),
    }


def artifacts_of(store: str) -> list[dict[str, Any]]:
    """Every artifact of a store: kind, fingerprint, size, age, and what refers to it.

    Its size is that of its folder and of the parts that its manifest lists; a part that two
    artifacts list counts in both. `referred_by` are runs, pins, names and other artifacts; empty
    where `prune` would remove it.
    """
    from stillhouse.storage.artifact import load_manifest
    from stillhouse.storage.reachability import KINDS, list_objects, references

    objects = list_objects(store)
    reached = references(store, objects)
    sizes = {item.path: item.num_bytes for item in objects}
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for path in sizes:
        folders[path.rpartition("/")[0]].add(path)
    rows: list[dict[str, Any]] = []
    for item in objects:
        folder, _, file = item.path.rpartition("/")
        if file != "manifest.json" or item.kind not in KINDS:
            continue
        name = item.names[-1] if item.names else folder.rpartition("/")[2]
        listed = {part.path for part in load_manifest(join(store, folder)).parts}
        labels = {label for label in reached.get(name, ()) if "/receipts" not in label}
        rows.append(
            {
                "kind": item.kind,
                "fingerprint": name,
                "bytes": sum(sizes.get(path, 0) for path in folders[folder] | listed),
                "age_s": round(max(time.time() - item.modified, 0)),
                "referred_by": sorted(labels),
            }
        )
    return sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["age_s"]))


def follow(
    uri: str, pause: Callable[[float], object] = time.sleep
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A run's status whenever it changes, with the names of the steps that changed, to its end.

    Args:
        uri: a run.
        pause: waits so many seconds.

    Raises:
        ArtifactError: not a run.
    """
    folder, seen, state = absolute_uri(uri), dict[str, Any](), "running"
    while state == "running":
        if seen:
            pause(_POLL_S)
        found = read_status(folder)
        if found is None:
            raise ArtifactError(f"{uri} is not a run: only a run can be followed")
        state = found["state"]
        steps, before = found["steps"], seen.get("steps", {})
        changed = [name for name, step in steps.items() if before.get(name) != step]
        if changed or state != seen.get("state"):
            yield found | {"uri": folder}, changed
        seen = found


def show_to_end(uri: str, show: Callable[[dict[str, Any], list[str]], object] | None) -> None:
    """Show changes until the run ends or Ctrl-C; the run itself is not touched."""
    with suppress(KeyboardInterrupt):
        for found, changed in follow(uri):
            if show is not None:
                show(found, changed)


def draw_report(uri: str) -> str:
    """Render a run's stored report data again; the URI of the page.

    Raises:
        ArtifactError: the run has no report (it is not finished, or no run).
    """
    folder = absolute_uri(uri)
    try:
        page = draw(read(folder), folder)
    except FileNotFoundError:
        raise ArtifactError(f"{uri} has no report yet: see `stillhouse status {uri}`") from None
    if exists(join(folder, DIGESTS)):
        put_digests(folder, "report.html")
    return page
