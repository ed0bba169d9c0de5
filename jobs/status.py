"""`stillhouse status` and `report`: runs and artifacts, read from their store alone.

A submitted job is looked up in its Ray cluster too, while that is there.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from math import inf
from typing import Any

from stillhouse.errors import ArtifactError, ClusterError, SpecError
from stillhouse.jobs.ids import ADDRESS_VARIABLE, DEFAULT_STORE, JOB_ID, JOB_PREFIX, only_one
from stillhouse.report.page import draw, read
from stillhouse.storage import names
from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.commit import MARKER
from stillhouse.storage.filesystem import absolute_uri, exists, join, list_names
from stillhouse.storage.names import Version
from stillhouse.storage.reachability import KINDS, list_objects, references
from stillhouse.storage.run_record import DIGESTS, event_files, put_digests, read_status

_POLL_S = 2.0


def status_of(uri: str) -> dict[str, Any]:
    """The status of a run, the history of `STORE#name`, or all that a store holds.

    Raises:
        ArtifactError: neither a run nor a store, or nothing published under the name.
    """
    _, mark, name = uri.rpartition("#")
    if mark and "/" not in name:
        return _history_of(uri)
    folder = absolute_uri(uri)
    found = read_status(folder)
    if found is not None:
        return found | {"uri": folder, "events": len(event_files(folder))}
    runs = list_names(join(folder, "runs"))
    if not runs and not exists(join(folder, MARKER)):
        raise ArtifactError(f"{uri} is neither a run nor a store that holds runs")
    return {
        "store": folder,
        "runs": [
            read_status(join(folder, "runs", name)) or {"run": name, "state": "unknown"}
            for name in runs
        ],
        "names": names_of(folder),
        "artifacts": _artifacts_of(folder),
    }


def _history_of(uri: str) -> dict[str, Any]:
    place, mark, name = uri.rpartition("#")
    given, name = names.split_name(f"{place}{mark}{name.partition('@')[0]}")
    store = absolute_uri(given)
    found = [row for row in names_of(store) if row["name"] == name]
    if not found:
        raise ArtifactError(f"nothing is published under {name!r} in {given}")
    return {"store": store, **found[0]}


def names_of(store: str) -> list[dict[str, Any]]:
    """Every published name of a store with its history, the newest version last."""
    times = {item.path: item.modified for item in list_objects(join(store, "names"))}

    def row(name: str, version: Version) -> dict[str, Any]:
        published = times.get(f"{name}/{version.number:08d}.json", inf)
        last = version.last  # what a run published last, under this version or before
        run = last.run if last is not None and last.selection == version.selection else None
        return {
            "version": version.number,
            "selection": version.selection,
            "published": None
            if published == inf
            else datetime.fromtimestamp(published, UTC).isoformat(timespec="seconds"),
            "run": run,
            "again": version.again,
        }

    return [
        {"name": name, "versions": [row(name, version) for version in names.history(store, name)]}
        for name in names.published_names(store)
    ]


def _artifacts_of(store: str) -> list[dict[str, Any]]:
    """Every artifact of a store: kind, fingerprint, size, age, and what refers to it.

    Its size is that of its folder and of the parts that its manifest lists; a part that two
    artifacts list counts in both. `referred_by` are runs, pins, names and other artifacts; empty
    where `prune` would remove it.
    """
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
        parts = {part.path for part in load_manifest(join(store, folder)).parts}
        labels = {label for label in reached.get(name, ()) if "/receipts" not in label}
        rows.append(
            {
                "kind": item.kind,
                "fingerprint": name,
                "bytes": sum(sizes.get(path, 0) for path in folders[folder] | parts),
                "age_s": round(max(time.time() - item.modified, 0)),
                "referred_by": sorted(labels),
            }
        )
    return sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["age_s"]))


def follow(
    uri: str, pause: Callable[[float], object] = time.sleep
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A run's status whenever it changes, with the names of the steps that changed, to its end.

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
    """Show changes until the run ends or Ctrl-C, which leaves the run itself alone."""
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


def find(text: str, address: str | None, store: str | None) -> tuple[str | None, str]:
    """The id of a submitted job, or None and the URI of something else.

    Raises:
        SpecError: `text` is a prefix of no known id, or of several.
    """
    if JOB_ID.fullmatch(text):
        return text, ""
    if not JOB_PREFIX.fullmatch(text) or exists(absolute_uri(text)):
        return None, text
    place = absolute_uri(store or DEFAULT_STORE)
    runs = {name: join(place, "runs", name) for name in list_names(join(place, "runs"))}
    states = [read_status(uri) or {} for uri in runs.values()]
    attempts = [one for state in states for one in (state, *state.get("earlier", []))]
    jobs = {one["submission"] for one in attempts if one.get("submission")}
    found = _with_prefix([*runs, *jobs], text)
    if not found and _has_cluster(address):
        from stillhouse.jobs.ray_jobs import Cluster

        found = _with_prefix(Cluster(address).job_ids(), text)
    name = only_one(text, found, f"the runs and jobs of {place}")
    return (None, runs[name]) if name in runs else (name, "")


def _with_prefix(ids: list[str], text: str) -> list[str]:
    """Ids that begin with `text`; `0123abcd-2` is attempt 2 of the jobs that begin so."""
    stem, mark, number = text.partition("-")
    return sorted(one for one in ids if one.startswith(stem) and one.endswith(mark + number))


def _has_cluster(address: str | None) -> bool:
    return any((address, os.environ.get(ADDRESS_VARIABLE), os.environ.get("RAY_ADDRESS")))


def run_to_follow(job: dict[str, Any]) -> str:
    """The URI of a submitted job's run, from its `job_status`.

    Raises:
        SpecError: it has none yet.
    """
    if job["run"] is None:
        raise SpecError(
            f"job {job['job_id']} has no run yet: follow it with `submit SPEC --follow`"
        )
    return job["run"]["uri"]


def job_status(job_id: str, address: str | None, store: str | None) -> dict[str, Any]:
    """What Ray and the store know of a submitted job.

    Args:
        job_id: as `submit` printed it.
        address: of the dashboard, or None for that of the environment.
        store: where to look when Ray does not know the job, and so not its store either.

    Returns:
        `job_id`; `cluster` (state, message, first error line of the output; None without Ray, then
        `why_not` says why); `run`, the run's status as its store has it, or None.

    Raises:
        ClusterError: no Ray to ask, and no store given. ArtifactError: the job is unknown.
    """
    cluster = why_not = None
    try:
        cluster = _ask_ray(job_id, address, store)
    except (ClusterError, ArtifactError) as error:
        if store is None:
            raise
        why_not = str(error)
    place = cluster["store"] if cluster is not None else store
    run = None if place is None else run_of(place, job_id)
    if cluster is None and run is None:
        raise ArtifactError(
            f"no run in {store} was made by job {job_id}: is this its store (`--store`)? A job "
            "that found nothing to do leaves no trace there"
        )
    return {"job_id": job_id, "cluster": cluster, "why_not": why_not, "run": run}


def _ask_ray(job_id: str, address: str | None, store: str | None) -> dict[str, Any]:
    if store is not None and not _has_cluster(address):
        raise ClusterError("no cluster was asked")
    from stillhouse.jobs.ray_jobs import Cluster

    cluster = Cluster(address)
    job = cluster.job(job_id)
    if job is None:
        raise ArtifactError(
            f"the cluster at {cluster.url} does not know job {job_id} (its head was replaced?)"
            + (": give `--store` to see what is in its store" if store is None else "")
        )
    state = job.status.value
    failed = job.status.is_terminal() and state != "SUCCEEDED"
    return {
        "address": cluster.url,
        "state": state,
        "exit_code": job.driver_exit_code,
        "store": (job.metadata or {}).get("stillhouse_store"),
        "error": first_error(cluster.output(job_id)) or (job.message or "") if failed else None,
    }


def first_error(output: str) -> str | None:
    """The line that says why: our own `error:`, else the end of the first traceback."""
    lines = output.splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    if not starts:
        return None
    return next((line for line in lines[starts[0] + 1 :] if line and line[0] != " "), None)


def run_of(store: str, job_id: str) -> dict[str, Any] | None:
    """The status of the run that a submitted job worked on, from the store alone.

    Where another attempt at that run came later, `was` holds how this job's own one ended.
    """
    folder = join(absolute_uri(store), "runs")
    for name in list_names(folder):
        found = read_status(join(folder, name)) or {}
        if found.get("submission") == job_id:
            return status_of(join(folder, name))
        was = [one for one in found.get("earlier", []) if one["submission"] == job_id]
        if was:
            return status_of(join(folder, name)) | {"was": was[-1]}
    return None
