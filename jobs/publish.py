"""`stillhouse publish`, and what a run with `publish: NAME` does at its end."""

from datetime import UTC, datetime
from typing import Any

import yaml
from pydantic import ValidationError

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import open_selection
from stillhouse.spec import SelectSpec
from stillhouse.storage import names
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import MARKER
from stillhouse.storage.filesystem import absolute_uri, exists, join, read_bytes
from stillhouse.storage.names import Publication, Version
from stillhouse.storage.reachability import list_objects
from stillhouse.storage.run_record import now, read_json

_NOT_OWNER = {"compute", "name", "store", "storage_options", "publish"}


def owner(spec: SelectSpec) -> dict[str, Any]:
    """The settings by which a name knows its spec: as written, without widths and the store.

    Defaults are left out, so that a new version of Stillhouse with new keys is no new owner.
    """
    return spec.model_dump(mode="json", exclude=_NOT_OWNER, exclude_defaults=True)


def check_name(store: Store, spec: SelectSpec) -> None:
    """Refuse a `publish` name of another spec before any work.

    Raises:
        SpecError: naming the keys that differ.
    """
    if spec.publish is not None:
        now_stands = names.current(store.uri, spec.publish)
        names.check_owner(now_stands, spec.publish, owner(spec), store.uri)


def publish_result(
    store: Store, spec: SelectSpec, result: dict[str, Any], started: str
) -> dict[str, Any]:
    """Publish a run's selection under the spec's `publish`, unless that is what stands.

    Args:
        store: the run's.
        spec: the run's.
        result: of the run.
        started: when the run began, before it listed its inputs.

    Returns:
        `{"published": {name, version, selection, new}}`; empty where the spec has no `publish`.
    """
    if spec.publish is None:
        return {}
    selection = result["selection_fingerprint"]
    run = result["run"].rsplit("/", 1)[-1]
    made = Publication(selection, run, owner(spec), started)
    version, new = names.publish_run(store.uri, spec.publish, made)
    return {"published": _shown(store.uri, spec.publish, version, new)}


def publish_by_hand(name: str, to: str | None, store: str) -> dict[str, Any]:
    """Let a name stand for another selection, under a new number.

    Args:
        name: the name, or `STORE#name`.
        to: a version of its history, the URI of a run or selection in the store, or None: forward
            to what a run published last.
        store: the store of a bare name.

    Returns:
        The object that `publish --json` prints.

    Raises:
        SpecError: no valid name. ArtifactError: no such store, version, run or selection.
    """
    given, name = names.split_name(name, store)
    uri = absolute_uri(given)
    if not exists(join(uri, MARKER)):
        raise ArtifactError(f"{given} is not a store: it holds no {MARKER} (give `--store`)")
    if to is None or (to.isascii() and to.isdecimal()):
        version, new = names.roll_back(uri, name, None if to is None else int(to))
    else:
        version, new = _publish_uri(uri, name, to)
    return {"store": uri} | _shown(uri, name, version, new)


def _publish_uri(store: str, name: str, to: str) -> tuple[Version, bool]:
    selection = open_selection(to)
    if selection.store != store:
        raise ArtifactError(f"{to} is not in the store {store}: a name refers to its own store")
    run = read_json(absolute_uri(to), "result.json")
    made = None if run is None else _made_by(absolute_uri(to), selection.manifest.fingerprint)
    return names.publish_by_hand(store, name, selection.manifest.fingerprint, made)


def _made_by(run: str, selection: str) -> Publication:
    """What a finished run would have published; from now on its spec owns the name."""
    try:
        spec = SelectSpec.model_validate(yaml.safe_load(read_bytes(join(run, "spec.yaml"))))
    except (FileNotFoundError, yaml.YAMLError, ValidationError) as error:
        raise ArtifactError(f"{run}/spec.yaml is missing or broken: run its spec again") from error
    return Publication(selection, run.rsplit("/", 1)[-1], owner(spec), now())


def _shown(store: str, name: str, version: Version, new: bool) -> dict[str, Any]:
    return {
        "name": name,
        "version": version.number,
        "selection": join(store, "selections", version.selection),
        "again": version.again,
        "new": new,
    }


def history_of(uri: str) -> dict[str, Any]:
    """All versions of `STORE#name`: number, selection, when, the run, what it repeats.

    Raises:
        SpecError: no valid name. ArtifactError: nothing is published under it.
    """
    given, name = names.split_name(uri)
    store = absolute_uri(given)
    versions = names_of(store, only=name)
    if not versions:
        raise ArtifactError(f"nothing is published under {name!r} in {given}")
    return {"store": store, **versions[0]}


def names_of(store: str, only: str | None = None) -> list[dict[str, Any]]:
    """Every published name of a store with its history, the newest version last."""
    known = names.published_names(store)
    times = {item.path: item.modified for item in list_objects(join(store, "names"))}
    return [
        {
            "name": name,
            "versions": [
                {
                    "version": version.number,
                    "selection": version.selection,
                    "published": _time(times.get(f"{name}/{version.number:08d}.json")),
                    "run": _run_of(version),
                    "again": version.again,
                }
                for version in names.history(store, name)
            ],
        }
        for name in known
        if only in (None, name)
    ]


def _run_of(version: Version) -> str | None:
    """The run that made this version's selection, as far as the version knows."""
    last = version.last
    return last.run if last is not None and last.selection == version.selection else None


def _time(modified: float | None) -> str | None:
    if modified is None or modified == float("inf"):
        return None
    return datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds")
