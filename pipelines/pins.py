"""Pins: what was trained on the pool is kept when shards are added (`pin: first`).

A pin is a numbered create-only object that names an artifact; `pin: refresh` adds a number.
"""

from collections.abc import Callable
from typing import Literal

from pipelines.context import Context
from stillhouse.fingerprint import fingerprint
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Manifest


def pinned(
    ctx: Context,
    key: object,
    pin: Literal["first", "refresh"],
    wanted: str,
    make: Callable[[], Manifest],
) -> Manifest:
    """The pinned model artifact, made and pinned where there is none yet.

    Args:
        ctx: the run; a dry one pins nothing.
        key: settings that a change of starts a new pin.
        pin: `first` keeps what was pinned, `refresh` pins `wanted`.
        wanted: fingerprint of what today's inputs would give.
        make: makes that artifact.
    """
    store = ctx.store
    folder = store.path("pins", fingerprint(key))
    current = numbered.current(folder)
    if current is not None and (pin == "first" or current["models"] == wanted):
        found = store.find_manifest("models", current["models"])
        if found is not None:
            return found
    made = store.find_manifest("models", wanted) or make()
    if not ctx.dry:
        numbered.append(folder, {"models": made.fingerprint})
    return made
