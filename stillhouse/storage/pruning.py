"""How a prune and a run that starts keep out of each other's way.

Each says first what it does and looks for the other then, so that the second always sees the
first: a prune promises `pruning.json` and looks for live runs, batch by batch; a run writes its
status and waits until no prune is promised, before it counts on anything that it found.
"""

import json
import time
from contextlib import suppress

from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import filesystem, join, read_bytes

_PAGE = "pruning.json"
LEASE_S = 300.0
"""How long a promise holds: past the removals of a batch, and more than clocks differ by."""
_POLL_S = 1.0


def promise(store: str) -> None:
    """Say that objects may be removed during the next `LEASE_S`."""
    page = {"until": time.time() + LEASE_S}
    replace(join(store, _PAGE), json.dumps(page).encode())


def take_back(store: str) -> None:
    """Say that nothing is removed any more."""
    fs, path = filesystem(join(store, _PAGE))
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def promised(store: str) -> bool:
    """Whether a prune is at work; one that died counts until its promise ends."""
    try:
        page = json.loads(read_bytes(join(store, _PAGE)))
    except FileNotFoundError:
        return False
    return float(page["until"]) > time.time()


def wait_for_prune(store: str) -> None:
    """Return when no prune is at work."""
    while promised(store):
        time.sleep(_POLL_S)
