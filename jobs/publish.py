"""`stillhouse publish`, and what a run with `publish: NAME` does at its end."""

from typing import Any

import yaml
from pydantic import ValidationError

from stillhouse.errors import ArtifactError
from stillhouse.jobs.ids import ARTIFACTS, MIN_PREFIX, resolve
from stillhouse.jobs.kinds import RESULTS, result_artifact, spec_model
from stillhouse.reading.readers import open_artifact, open_selection
from stillhouse.spec import NOT_IDENTITY, JobSpec
from stillhouse.storage import names
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import MARKER
from stillhouse.storage.filesystem import absolute_uri, exists, join, read_bytes
from stillhouse.storage.layout import has_manifest
from stillhouse.storage.names import Publication, Version
from stillhouse.storage.run_record import now, read_json


def owner(spec: JobSpec) -> dict[str, Any]:
    """The settings by which a name knows its spec: as written, without widths and the store.

    Defaults are left out, so that a new version of Stillhouse with new keys is no new owner.
    """
    return spec.model_dump(mode="json", exclude=NOT_IDENTITY, exclude_defaults=True)


def check_name(store: Store, spec: JobSpec) -> None:
    """Refuse a `publish` name of another spec before any work.

    Raises:
        SpecError: naming the keys that differ.
    """
    if spec.publish is not None:
        current = names.current(store.uri, spec.publish)
        names.check_owner(current, spec.publish, owner(spec), store.uri)


def publish_result(
    store: Store, spec: JobSpec, result: dict[str, Any], started: str
) -> dict[str, Any]:
    """Publish a run's result under the spec's `publish`, unless it is the current version.

    `started` is when the run began, before it listed its inputs. Returns `{"published": {name,
    version, new, the artifact's URI}}`, or an empty dictionary without a `publish`.
    """
    if spec.publish is None:
        return {}
    publication = _publication(result, spec, started)
    version, new = names.publish_run(store.uri, spec.publish, publication)
    return {"published": _published(store.uri, spec.publish, version, new)}


def publish_by_hand(name: str, to: str | None, store: str) -> dict[str, Any]:
    """Let a name stand for another artifact, under a new version number.

    Args:
        name: the name, or `STORE#name`.
        to: a version of its history, a run or artifact of the store (its URI, or a prefix of its
            id), or None: forward to what a run published last.
        store: the store of a bare name.

    Returns:
        The object that `publish --json` prints.

    Raises:
        SpecError: invalid name. ArtifactError: no such store, version, run or artifact.
    """
    given, name = names.split_name(name, store)
    uri = absolute_uri(given)
    if not exists(join(uri, MARKER)):
        raise ArtifactError(f"{given} is not a store: it holds no {MARKER} (give `--store`)")
    if to is None or (to.isascii() and to.isdecimal() and len(to) < MIN_PREFIX):
        version, new = names.roll_back(uri, name, None if to is None else int(to))
    else:
        version, new = _publish_uri(uri, name, resolve(to, uri, ARTIFACTS))
    return {"store": uri} | _published(uri, name, version, new)


def _publish_uri(store: str, name: str, to: str) -> tuple[Version, bool]:
    """Publish the artifact at a URI, or that of the run there."""
    folder = absolute_uri(to)
    result = read_json(folder, "result.json")
    kind, made = _artifact_at(to) if result is None else result_artifact(result)
    if not has_manifest(join(store, kind, made)):
        raise ArtifactError(f"{to} is not in the store {store}: a name refers to its own store")
    current = names.current(store, name)
    if current is not None and current.kind != kind:
        raise ArtifactError(
            f"{name!r} stands for one of `{current.kind}` and {to} is one of `{kind}`: use another"
        )
    if kind == "models" and not exists(join(store, kind, made, "config.json")):
        raise ArtifactError(f"{to} is no trained model (no config.json): a name is for results")
    publication = None if result is None else _publication(result, _spec_of(folder), now())
    return names.publish_by_hand(store, name, made, publication, kind)


def _artifact_at(uri: str) -> tuple[str, str]:
    """Kind and fingerprint of the artifact at a URI, or of the selection that `STORE#name` is."""
    kinds = {kind for kind, _ in RESULTS.values()}
    is_artifact = has_manifest(absolute_uri(uri))
    manifest = (open_artifact if is_artifact else open_selection)(uri).manifest
    if manifest.kind not in kinds:
        raise ArtifactError(f"{uri} is one of `{manifest.kind}`: a name stands for {sorted(kinds)}")
    return manifest.kind, manifest.fingerprint


def _publication(result: dict[str, Any], spec: JobSpec, started: str) -> Publication:
    """What a finished run publishes; its spec owns the name from then on."""
    kind, made = result_artifact(result)
    run = result["run"].rsplit("/", 1)[-1]
    return Publication(made, run, owner(spec), started, kind)


def _spec_of(run: str) -> JobSpec:
    try:
        content = yaml.safe_load(read_bytes(join(run, "spec.yaml")))
        return spec_model(content).model_validate(content)
    except (FileNotFoundError, yaml.YAMLError, ValidationError, LookupError, TypeError) as error:
        raise ArtifactError(f"{run}/spec.yaml is missing or broken: run its spec again") from error


def _published(store: str, name: str, version: Version, new: bool) -> dict[str, Any]:
    return {
        "name": name,
        "version": version.number,
        version.kind.removesuffix("s"): join(store, version.kind, version.selection),
        "again": version.again,
        "new": new,
    }
