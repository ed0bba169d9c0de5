"""Paths in a spec: which of them only this machine can read, and the spec without any."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from stillhouse.classification.unlabelled import UnlabelledImages
from stillhouse.data_settings import DataSource, ExcludeSettings
from stillhouse.distillation.image_sources import ImageData
from stillhouse.errors import SpecError
from stillhouse.evaluation.settings import TaskFiles
from stillhouse.settings import Settings
from stillhouse.spec import NOT_IDENTITY, JobSpec

S = TypeVar("S", bound=JobSpec)
_REFERENCES = {"threshold_from", "selection", "log"}
"""Keys whose text is the URI of an artifact, or its fingerprint in the store."""


@dataclass(frozen=True, slots=True)
class _PathKey:
    """A key that may hold paths: the steps to it, its value, and whether it names data."""

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
        """Not a URI, the name of a model on the hub, or that of an artifact in the store."""
        if "://" in path:
            return False
        if self.keys[-1] in _REFERENCES:
            return "/" in path
        if self.is_data:
            return True
        return path.startswith((".", "/", "~")) or Path(path).expanduser().exists()

    def absolute(self, path: str) -> str:
        return str(Path(path).expanduser().absolute()) if self.is_local(path) else path

    def section_of(self, content: Any) -> Any:
        """The section of a dumped spec that holds the last key."""
        for key in self.keys[:-1]:
            content = content[key]
        return content


def refuse_local_paths(spec: JobSpec, where: str) -> None:
    """Refuse a spec with local paths for a job that runs `where`.

    `file:///...` is accepted: a disk that every node has mounted under the same path.

    Raises:
        SpecError: naming each key and path.
    """
    local = [
        (key.name, path) for key in _path_keys(spec) for path in key.paths if key.is_local(path)
    ]
    others = {path for name, path in local if name != "tokenizer.path"}
    found = [  # the tokenizer of a given model is by default the one beside it: named once
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
    content: dict[str, Any] = spec.model_dump(mode="json", exclude_unset=True)
    for key in _path_keys(spec):
        if key.value is not None:
            paths = [key.absolute(path) for path in key.paths]
            key.section_of(content)[key.keys[-1]] = (
                paths[0] if isinstance(key.value, str) else paths
            )
    return type(spec).model_validate(content)


def identity_of(spec: JobSpec) -> dict[str, Any]:
    """The settings that decide what a job makes: without widths, store, name and paths.

    What is read is identified by its content instead.
    """
    content: dict[str, Any] = spec.model_dump(mode="json", exclude=NOT_IDENTITY)
    for key in _path_keys(spec):
        if key.keys != ("store",):
            key.section_of(content).pop(key.keys[-1])
    return content


def _path_keys(spec: JobSpec) -> Iterator[_PathKey]:
    """Every key that may hold paths, the store first; other keys that change no result, too."""
    yield _PathKey(("store",), spec.store, True)
    yield from _in_section(spec, ())


_DATA = (DataSource, ExcludeSettings, ImageData, TaskFiles, UnlabelledImages)
"""Sections whose paths are files, whatever they look like."""


def _in_section(section: BaseModel, keys: tuple[str | int, ...]) -> Iterator[_PathKey]:
    is_data = isinstance(section, _DATA)
    lists = section.lists if isinstance(section, ExcludeSettings) else {}
    for name in type(section).model_fields:
        value, place = getattr(section, name), (*keys, name)
        if isinstance(section, Settings) and name in section.places:
            yield _PathKey(place, None, False)
        elif isinstance(value, BaseModel):
            yield from _in_section(value, place)
        elif (
            name == "path"
            or name in _REFERENCES
            or name in lists
            or (name == "test" and isinstance(value, str))
        ):
            yield _PathKey(place, value, is_data)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _in_section(item, (*place, i))
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, BaseModel):
                    yield from _in_section(item, (*place, key))
