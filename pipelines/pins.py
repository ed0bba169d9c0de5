"""Pins: what was trained on the pool is kept when shards are added (`pin: first`).

A pin is a numbered create-only object that names an artifact; `pin: refresh` adds a number.
"""

from collections.abc import Callable
from typing import Literal

from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context, Unfinished
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Manifest


def pinned(
    ctx: Context,
    step: str,
    key: object,
    pin: Literal["first", "refresh"],
    wanted: str,
    make: Callable[[], Manifest],
) -> Manifest:
    """The pinned model artifact, made and pinned where there is none yet.

    Args:
        ctx: the run; a dry one pins nothing.
        step: announced as reused where nothing is made; else `make` announces it.
        key: settings that a change of starts a new pin.
        pin: `first` keeps what was pinned, `refresh` pins `wanted`.
        wanted: fingerprint of what today's inputs would give.
        make: makes that artifact.

    Raises:
        Unfinished: a plan that looks at a part of the pool, and `refresh`: what the whole pool
            would give has no name yet.
    """
    if ctx.packed is not None and pin == "refresh":
        with ctx.step(step, total=1, reused=0):
            raise Unfinished(step)
    store = ctx.store
    folder = store.path("pins", fingerprint(key))
    current = numbered.current(folder)
    if current is not None and (pin == "first" or current["models"] == wanted):
        found = store.find_manifest("models", current["models"])
        if found is not None:
            return _reused(ctx, step, found)
    there = store.find_manifest("models", wanted)
    made = make() if there is None else _reused(ctx, step, there)
    if not ctx.dry:
        numbered.append(folder, {"models": made.fingerprint})
    return made


def _reused(ctx: Context, step: str, found: Manifest) -> Manifest:
    with ctx.step(step, total=1, reused=1):
        return found
