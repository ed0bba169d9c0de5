"""`stillhouse prune`: remove what no finished run, pin or published name refers to."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.storage.commit import MARKER
from stillhouse.storage.filesystem import absolute_uri, exists, join
from stillhouse.storage.reachability import (
    LEASE_S,
    StoredObject,
    announce_prune,
    end_prune,
    list_objects,
    references,
    remove,
    unreachable,
)
from stillhouse.storage.run_record import read_json

_BATCH = 500
_BATCH_S = LEASE_S / 2
"""A batch that takes longer is continued under a new lease."""


def prune_store(uri: str, *, grace_hours: float, yes: bool) -> dict[str, Any]:
    """Find what nothing needs, and remove it where `yes` says so.

    A live run may reuse any finished task, also one that only a dead run needed. So while a run
    is live (its status says running and was updated within the grace period) only temporaries are
    removed; runs are looked for again before every batch of removals, and a run that starts waits
    for the end of the prune (`stillhouse.storage.reachability`).

    Args:
        uri: the store.
        grace_hours: nothing younger is removed; longer than any pause of a live run, and than the
            clocks may differ.
        yes: remove; else only look.

    Returns:
        The object that `prune --json` prints.

    Raises:
        ArtifactError: not a store.
    """
    store = absolute_uri(uri)
    if not exists(join(store, MARKER)):
        raise ArtifactError(f"{uri} is not a store: it holds no {MARKER}")
    before = time.time() - 3600 * grace_hours
    found = look(store, before)
    removed = remove_found(store, found, before) if yes else []
    return {
        "store": store,
        "dry": not yes,
        "grace_hours": grace_hours,
        "live_runs": found.live,
        "unreachable": _sums_by_kind(found.gone),
        "removed": _sums_by_kind(removed),
        "objects": [item.path for item in found.gone],
    }


@dataclass(frozen=True, slots=True)
class StoreWalk:
    """What a walk through a store found: live runs, what may be removed, and its roots."""

    live: list[str]
    gone: list[StoredObject]
    roots: list[StoredObject]


def look(store: str, before: float) -> StoreWalk:
    """Walk through a store; only temporaries may be removed while a run is live."""
    objects = list_objects(store)
    gone = unreachable(objects, references(store, objects), before)
    live = live_runs(store, objects, before)
    if live:
        gone = [item for item in gone if item.is_temporary]
    return StoreWalk(live, gone, [item for item in objects if item.is_root])


def remove_found(store: str, found: StoreWalk, before: float) -> list[StoredObject]:
    """Remove in order until a run starts; what was removed.

    A run may have begun, reused what the walk found unused, and ended before the prune was
    announced. So where the roots have changed, the walk is repeated after the announcement.
    """
    removed: list[StoredObject] = []
    left = list(found.gone)
    try:
        while left:
            announce_prune(store)
            until = time.monotonic() + _BATCH_S
            if live_runs(store, list_objects(join(store, "runs")), before, prefix=""):
                left = [item for item in left if item.is_temporary]
            # after the runs: one that has ended in between has its result by now
            elif _roots(store) != found.roots:
                found = look(store, before)
                still = set(found.gone)
                left = [item for item in left if item in still]
                continue
            done = remove(store, left[:_BATCH], until)
            removed += done
            left = [item for item in left[:_BATCH] if item not in done] + left[_BATCH:]
    finally:
        end_prune(store)
    return removed


def _roots(store: str) -> list[StoredObject]:
    found = [
        replace(item, path=f"{folder}/{item.path}")
        for folder in ("names", "pins", "runs")
        for item in list_objects(join(store, folder))
    ]
    return [item for item in found if item.is_root]


def live_runs(
    store: str, objects: Sequence[StoredObject], before: float, prefix: str = "runs/"
) -> list[str]:
    """Runs that wrote something since `before` and have not ended.

    `objects` is a listing with the runs in it, `prefix` what precedes a run's name there.
    """
    young = [o.path for o in objects if o.path.startswith(prefix) and o.modified >= before]
    names = sorted({path[len(prefix) :].split("/", 1)[0] for path in young})
    states = {name: read_json(join(store, "runs", name), "status.json") for name in names}
    return [name for name, state in states.items() if state is None or state["state"] == "running"]


def _sums_by_kind(items: Sequence[StoredObject]) -> dict[str, dict[str, int]]:
    objects = Counter(item.kind for item in items)
    num_bytes: Counter[str] = Counter()
    for item in items:
        num_bytes[item.kind] += item.num_bytes
    return {kind: {"objects": n, "bytes": num_bytes[kind]} for kind, n in sorted(objects.items())}
