"""Paths in a spec: which ones only this machine can read, and the spec without any of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from stillhouse.data_settings import DataSource
from stillhouse.distillation.images import ImageData
from stillhouse.errors import SpecError
from stillhouse.spec import NOT_IDENTITY, JobSpec

S = TypeVar("S", bound=JobSpec)
_REFERENCES = {"threshold_from", "selection", "log"}
"""Keys whose text is the URI of an artifact, or its fingerprint in the store."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A key that may hold paths: the steps to it, and what they may be besides paths."""

    keys: tuple[str | int, ...]
    value: str | list[str] | None
    is_data: bool

    @property
    def name(self) -> str:
        return ".".join(map(str, self.keys))

    @property
    def paths(self) -> list[str]:
        return [self.value] if isinstance(self.value, str) else self.value or []

    def is_local(self, path: str) -> bool:
        """A name that is no path stays: of a model on the hub, of an artifact in the store."""
        if "://" in path:
            return False
        if self.keys[-1] in _REFERENCES:
            return "/" in path
        if self.is_data:
            return True
        return path.startswith((".", "/", "~")) or Path(path).expanduser().exists()

    def absolute(self, path: str) -> str:
        return str(Path(path).expanduser().absolute()) if self.is_local(path) else path


def refuse_local_paths(spec: JobSpec, where: str) -> None:
    """Refuse a spec with local paths for a job that runs `where`.

    `file:///...` is taken at its word: a disk that every node has mounted under the same path.

    Raises:
        SpecError: naming each key and path.
    """
    local = [(p.name, path) for p in _places(spec) for path in p.paths if p.is_local(path)]
    others = {path for name, path in local if name != "tokenizer.path"}
    found = [  # the tokenizer of a given model is by default the one beside it: said once
        f"`{name}: {path}`"
        for name, path in local
        if name != "tokenizer.path" or path not in others
    ]
    if found:
        raise SpecError(
            f"{where} cannot read local paths: {', '.join(found)}: give URIs such as "
            "s3://bucket/prefix, or file:///path where every node has that disk mounted"
        )


def with_absolute_paths(spec: S) -> S:
    """The same job for another working directory on this machine."""
    changed: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    for place in _places(spec):
        if place.value is not None:
            paths = [place.absolute(path) for path in place.paths]
            _holder(changed, place)[place.keys[-1]] = (
                paths[0] if isinstance(place.value, str) else paths
            )
    return type(spec).model_validate(changed)


def identity_of(spec: JobSpec) -> dict[str, Any]:
    """The settings that decide what a job makes: without widths, store and name, and without
    paths, for the identity of what is read is its content.
    """
    asked: dict[str, Any] = spec.model_dump(mode="json", exclude=NOT_IDENTITY)
    for place in _places(spec):
        if place.keys != ("store",):
            _holder(asked, place).pop(place.keys[-1])
    return asked


def _places(spec: JobSpec) -> Iterator[_Place]:
    """Every key that may hold paths, the store first."""
    yield _Place(("store",), spec.store, True)
    yield from _inside(spec, ())


def _inside(section: BaseModel, keys: tuple[str | int, ...]) -> Iterator[_Place]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        is_data = isinstance(section, DataSource | ImageData)
        yield from _found(value, (*keys, name), is_data)
        if isinstance(section, ImageData) and name == "test" and isinstance(value, str):
            yield _Place((*keys, name), value, is_data)


def _found(value: Any, keys: tuple[str | int, ...], is_data: bool) -> Iterator[_Place]:
    if isinstance(value, BaseModel):
        yield from _inside(value, keys)
    elif keys[-1] == "path" or keys[-1] in _REFERENCES:
        yield _Place(keys, value, is_data)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if isinstance(item, BaseModel):
                yield from _inside(item, (*keys, i))


def _holder(content: Any, place: _Place) -> Any:
    """The section of a dumped spec that a place's last key is in."""
    for key in place.keys[:-1]:
        content = content[key]
    return content
