"""Published names: `names/<name>/00000007.json`, created and never changed; the highest is current.

A version has everything that the next one depends on, so that publishing reads one object however
long the history is: the selection that readers get, and what a run published last (`last`), which
a roll-back copies. So a nightly run with unchanged inputs does not undo a roll-back, and a slow run
that listed its inputs before a faster one does not publish older data over newer.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from stillhouse.errors import ArtifactError, SpecError
from stillhouse.storage import numbered
from stillhouse.storage.commit import create
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.sealed import seal

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Safe in a path, in a URI's fragment and in a shell."""
_MAX_SHOWN = 3
_SPEED = {"compile", "micro_batch"}
"""Keys of `scoring` that only decide how fast it goes."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What a run publishes.

    Attributes:
        selection: fingerprint of the artifact.
        run: its fingerprint.
        spec: the settings by which two runs are the same job (no widths, no places).
        started: when the run began to list its inputs: UTC, ISO 8601.
        kind: of the artifact.
    """

    selection: str
    run: str
    spec: dict[str, Any]
    started: str
    kind: str = "selections"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a name.

    Attributes:
        number: 1, 2, ...
        selection: fingerprint of the artifact that readers of the name get.
        again: the earlier version that a roll-back repeats.
        last: what a run published last under this name; None if only people did.
        kind: of the artifact.
    """

    number: int
    selection: str
    again: int | None = None
    last: Publication | None = None
    kind: str = "selections"


def split_name(uri: str, default_store: str = "") -> tuple[str, str]:
    """`STORE#name` as (store, name); a bare name belongs to the default store.

    Raises:
        SpecError: an invalid name.
    """
    store, mark, name = uri.rpartition("#")
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise SpecError(
            f"invalid name {name!r}: use up to 63 of a-z, 0-9, `.`, `_` and `-`, "
            "starting with a letter or digit"
        )
    return (store if mark else default_store), name


def published_names(store: str) -> list[str]:
    return list_names(join(store, "names"))


def history(store: str, name: str) -> list[Version]:
    """All versions of a name, the oldest first."""
    folder = join(store, "names", name)
    return [_read(folder, number) for number in numbered.versions(folder)]


def current(store: str, name: str) -> Version | None:
    """The version that readers get; None where there is none. A listing and one small read."""
    folder = join(store, "names", name)
    numbers = numbered.versions(folder)
    return _read(folder, numbers[-1]) if numbers else None


def published(store: str, name: str) -> Version:
    """The version that `NAME` (the current one) or `NAME@VERSION` stands for.

    Raises:
        ArtifactError: nothing is published under the name, or it has no such version.
    """
    name, mark, number = name.partition("@")
    now = current(store, name)
    if now is None:
        raise ArtifactError(f"nothing is published under {name!r} in {store}")
    if not mark:
        return now
    if not number.isdecimal():
        raise ArtifactError(f"`{name}@{number}`: a version is a number: `{name}@{now.number}`")
    return _numbered(store, name, int(number))


def check_owner(version: Version | None, name: str, spec: dict[str, Any], store: str) -> None:
    """Refuse a name whose last run had another spec.

    Raises:
        SpecError: naming the keys that differ.
    """
    theirs, mine = _owner(version.last if version else None), _identity(spec)
    if theirs is None or theirs == mine:
        return
    raise SpecError(
        f"`publish: {name}` is in use by another spec ({_differences(theirs, mine)}): "
        "give another name, or run without `publish` and hand the name over with "
        f"`stillhouse publish {name} --to RUN --store {store}`"
    )


def publish_run(store: str, name: str, made: Publication) -> tuple[Version, bool]:
    """Publish what a run made, unless the last run's result is the same or newer.

    Returns:
        The current version, and whether this call wrote it.

    Raises:
        SpecError: the name is in use by another spec.
    """

    def decide(now: Version | None) -> Version | None:
        check_owner(now, name, made.spec, store)
        last = now.last if now else None
        if last is not None and (last.selection == made.selection or last.started > made.started):
            return None
        return Version(_next(now), made.selection, last=made, kind=made.kind)

    return _append(store, name, decide)


def publish_by_hand(
    store: str,
    name: str,
    selection: str,
    made: Publication | None = None,
    kind: str = "selections",
) -> tuple[Version, bool]:
    """Publish an artifact by its fingerprint; with `made`, that run's spec owns the name from now
    on. Returns as `publish_run`.
    """

    def decide(now: Version | None) -> Version | None:
        last = made or (now.last if now else None)
        same_owner = now is not None and _owner(now.last) == _owner(last)
        if now is not None and now.selection == selection and same_owner:
            return None
        return Version(_next(now), selection, last=last, kind=kind)

    return _append(store, name, decide)


def roll_back(store: str, name: str, number: int | None = None) -> tuple[Version, bool]:
    """Make version `number` current again, under a new number; None: what a run published last.

    Raises:
        ArtifactError: nothing is published under the name, or it has no such version.
    """

    def decide(now: Version | None) -> Version | None:
        if now is None:
            raise ArtifactError(f"nothing is published under {name!r} in {store}")
        target = now.last if number is None else _numbered(store, name, number)
        if target is None:
            raise ArtifactError(f"no run has published under {name!r}: say what, with `--to`")
        if target.selection == now.selection:
            return None
        return replace(
            now, number=_next(now), selection=target.selection, again=number, kind=target.kind
        )

    return _append(store, name, decide)


def _append(
    store: str, name: str, decide: Callable[[Version | None], Version | None]
) -> tuple[Version, bool]:
    """Create the version that `decide` returns for the current one; decide again if another writer
    was first. A put whose answer was lost is the current version then, and not repeated.
    """
    folder = join(store, "names", name)
    while True:
        now = current(store, name)
        wanted = decide(now)
        if wanted is None:
            assert now is not None, "there is a current version where no new one is needed"
            return now, False
        content = asdict(wanted)
        number = content.pop("number")
        if create(join(folder, f"{number:08d}.json"), seal(content)):
            return wanted, True


def _read(folder: str, number: int) -> Version:
    content = numbered.read_version(folder, number)
    try:
        last = content.get("last")
        return Version(
            number,
            content["selection"],
            content.get("again"),
            Publication(**last) if last is not None else None,
            content.get("kind", "selections"),
        )
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"broken version {number} in {folder}: {error}") from error


def _next(now: Version | None) -> int:
    return now.number + 1 if now else 1


def _owner(last: Publication | None) -> dict[str, Any] | None:
    return _identity(last.spec) if last else None


def _identity(spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a spec that decide what it publishes; a take-down goes on under its name.

    Without sections that are not there: an older release may not have known them.
    """
    spec = {key: value for key, value in spec.items() if value not in (None, [], {})}
    if spec.get("job") != "distill":  # which chooses by what it evaluates on
        spec.pop("evaluate", None)
    if spec.get("job") != "select":
        return spec
    kept = {key: value for key, value in spec.items() if key not in {"train", "exclude"}}
    scoring = {k: v for k, v in spec.get("scoring", {}).items() if k not in _SPEED}
    return kept | {"scoring": scoring} if scoring else {k: kept[k] for k in kept if k != "scoring"}


def _numbered(store: str, name: str, number: int) -> Version:
    folder = join(store, "names", name)
    known = numbered.versions(folder)
    if number not in known:
        raise ArtifactError(
            f"{name!r} has no version {number}: it has {known[0]} to {known[-1]} "
            f"(`stillhouse status {store}#{name}`)"
        )
    return _read(folder, number)


def _differences(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    """The keys in which two specs differ, with both values; a key that only one has is at its
    default in the other.
    """
    left, right = _flat(theirs), _flat(mine)
    keys = [key for key in sorted(left | right) if left.get(key) != right.get(key)]
    shown = [
        f"`{key}`: {left.get(key, 'default')} there, {right.get(key, 'default')} here"
        for key in keys[:_MAX_SHOWN]
    ]
    more = [f"and {len(keys) - _MAX_SHOWN} more"] if len(keys) > _MAX_SHOWN else []
    return "; ".join([*shown, *more])


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{path}.{name}" if path else str(name)).items()
    }
