"""Which paths of a spec only this machine can read, for jobs that run elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.errors import SpecError
from stillhouse.spec import DataSource, SelectSpec


def refuse_local_paths(spec: SelectSpec, where: str) -> None:
    """Refuse a spec with local paths for a job that runs `where`.

    `file:///...` is taken at its word: a disk that every node has mounted under the same path.

    Raises:
        SpecError: naming each key and path.
    """
    found = [f"`{key}: {path}`" for key, path in _paths(spec) if _is_local(key, path)]
    if found:
        raise SpecError(
            f"{where} cannot read local paths: {', '.join(found)}: give URIs such as "
            "s3://bucket/prefix, or file:///path where every node has that disk mounted"
        )


def with_absolute_paths(spec: SelectSpec) -> SelectSpec:
    """The same job for another working directory on this machine."""
    changed: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    changed["store"] = _absolute("store", spec.store)
    for section in ("pool", "target"):
        changed[section]["path"] = [_absolute("path", p) for p in getattr(spec, section).paths]
    if isinstance(spec.target.heldout, DataSource):
        held = [_absolute("path", p) for p in spec.target.heldout.paths]
        changed["target"]["heldout"]["path"] = held
    for key in ("tokenizer.path", "prior.path", "conditional.path", "selection.threshold_from"):
        section, name = key.split(".")
        value = getattr(getattr(spec, section), name)
        if value is not None:
            changed[section][name] = _absolute(key, value)
    return SelectSpec.model_validate(changed)


def _paths(spec: SelectSpec) -> Iterator[tuple[str, str]]:
    """Every path of the spec, with its key."""
    yield "store", spec.store
    yield from (("pool.path", path) for path in spec.pool.paths)
    yield from (("target.path", path) for path in spec.target.paths)
    if isinstance(spec.target.heldout, DataSource):
        yield from (("target.heldout.path", path) for path in spec.target.heldout.paths)
    for key, path in (
        ("tokenizer.path", spec.tokenizer.path),
        ("prior.path", spec.prior.path),
        ("conditional.path", spec.conditional.path),
        ("selection.threshold_from", spec.selection.threshold_from),
    ):
        if path is not None:
            yield key, path


def _is_local(key: str, path: str) -> bool:
    """A name that is no path stays: of a model on the hub, of a selection in the store."""
    if "://" in path:
        return False
    if key in {"tokenizer.path", "prior.path", "conditional.path"}:
        return path.startswith((".", "/", "~")) or Path(path).expanduser().exists()
    return key != "selection.threshold_from" or "/" in path


def _absolute(key: str, path: str) -> str:
    return str(Path(path).expanduser().absolute()) if _is_local(key, path) else path
