"""`from:` in a spec: a run, a published name or an artifact, found and put in place of its name."""

import re
from typing import TypeVar

from stillhouse.errors import ArtifactError, SpecError
from stillhouse.settings import Settings
from stillhouse.storage import names
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import absolute_uri, exists, join
from stillhouse.storage.layout import artifact_names
from stillhouse.storage.run_record import read_json

S = TypeVar("S", bound=Settings)
_MADE = {
    "data": ("selection",),
    "init": ("model",),
    "model": ("model",),
    "policy": ("model",),
    "prior": ("prior", "model"),
    "conditional": ("conditional", "model"),
    "tokenizer": ("tokenizer",),
}
"""By the section that says `from`: what it takes of a run's artifacts, the first that is there."""
_KINDS = ("runs", "selections", "tokens", "models")
_ID = re.compile(r"[0-9a-f]{8,64}")


def resolved(spec: S, store: Store) -> S:
    """The spec with the place of what each `from` names: in `path` where a section has one."""
    return _resolved(spec, store, "data")


def _resolved(section: S, store: Store, what: str) -> S:
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value, kind = getattr(section, name), name if name in _MADE else what
        if isinstance(value, Settings):
            made: object = _resolved(value, store, kind)
        elif isinstance(value, list) and any(isinstance(one, Settings) for one in value):
            made = [_resolved(one, store, kind) for one in value]
        else:
            continue
        changes |= {name: made} if made != value else {}
    given = getattr(section, "from_", None)
    if given is not None:
        place = find_input(store, given, what)
        has_path = "path" in type(section).model_fields
        changes |= {"path": place, "from_": None} if has_path else {"from_": place}
    return section.model_copy(update=changes) if changes else section


def find_input(store: Store, given: str, what: str = "data") -> str:
    """The folder of an artifact.

    Args:
        store: of the job; ids are looked for in it.
        given: a run's URI or id, STORE#NAME (#NAME of this store), or an artifact's URI or id; ids
            may be cut short to eight characters.
        what: the section that names it.

    Raises:
        ArtifactError: nothing of that name, or a run that is not finished or made no such thing.
        SpecError: an id that several things have.
    """
    place, mark, name = given.rpartition("#")
    if mark and "/" not in name:
        place = absolute_uri(place) if place else store.uri
        published = names.current(place, name)
        if published is None:
            raise ArtifactError(f"nothing is published under {name!r} in {place}")
        return join(place, published.kind, published.selection)
    folder = absolute_uri(given)
    if _ID.fullmatch(given) and not exists(folder):
        folder = _by_id(store, given)
    return _of_run(folder, what) if folder.rsplit("/", 2)[-2] == "runs" else folder


def _by_id(store: Store, given: str) -> str:
    found = [
        store.path(kind, name)
        for kind in _KINDS
        for name in artifact_names(store.path(kind))
        if name.startswith(given)
    ]
    if not found:
        raise ArtifactError(f"no run and no artifact of {store.uri} has an id that begins {given}")
    if len(found) > 1:
        raise SpecError(f"{given!r} may be any of {', '.join(found)}: give more characters")
    return found[0]


def _of_run(folder: str, what: str) -> str:
    result = read_json(folder, "result.json")
    if result is None:
        known = "the run is not finished" if exists(join(folder, "spec.yaml")) else "no run"
        raise ArtifactError(f"{folder}: {known} (see `stillhouse status {folder}`)")
    made = [result["artifacts"].get(key) for key in _MADE[what]]
    found = next((uri for uri in made if uri), None)
    if found is None and "model" in _MADE[what] and "model_fingerprint" in result:  # the best
        found = join(folder.rsplit("/", 2)[0], "models", result["model_fingerprint"])
    if found is None:
        noun = {"data": "selection", "init": "model", "policy": "model"}.get(what, what)
        raise ArtifactError(f"{folder} is a run of `job: {result['job']}`: it made no {noun}")
    return found
