"""Task files of lm-evaluation-harness: YAML, with all that it includes as one mapping.

Files that it names, modules of functions and data, are listed; in the mapping each stands as
`file:NUMBER`, a function as `!function file:NUMBER.name`.
"""

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from stillhouse.errors import InputError, SpecError
from stillhouse.storage.filesystem import FileInfo, exists, list_files, read_bytes

FUNCTION, FILE = "!function ", "file:"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task file.

    Attributes:
        content: the whole mapping.
        files: that it names, by number.
    """

    content: dict[str, Any] = field(default_factory=dict[str, Any])
    files: list[FileInfo] = field(default_factory=list[FileInfo])

    @property
    def name(self) -> str:
        return self.content["task"]


def read_task_file(uri: str) -> TaskFile:
    """Read a task file and what it includes; each name in a file is relative to that file.

    Raises:
        SpecError: no YAML mapping, one without `task`, a circle of includes, data in a folder.
        InputError: a file that does not exist.
    """
    made = TaskFile()
    made.content.update(_merged(uri, made.files, ()))
    if not isinstance(made.content.get("task"), str):
        raise SpecError(f"`evaluate.tasks`: {uri} is no task file: it has no `task: NAME`")
    return made


def _merged(uri: str, files: list[FileInfo], above: tuple[str, ...]) -> dict[str, Any]:
    """A file over those that it includes."""
    if uri in above:
        raise SpecError(f"`evaluate.tasks`: {uri} includes itself, by way of {above[-1]}")
    content, folder = _read(uri), uri.rpartition("/")[0]
    included = content.pop("include", None) or []
    whole: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        whole |= _merged(beside(folder, str(name)), files, (*above, uri))

    def numbered(name: str) -> list[str]:
        try:
            found = list_files([beside(folder, name)], (posixpath.splitext(name)[1],))
        except InputError as error:
            raise InputError(f"{uri} names {name!r}: {error}") from error
        files.extend(found)
        return [f"{FILE}{len(files) - len(found) + i}" for i in range(len(found))]

    _refuse_folders(uri, folder, content)
    return whole | _located(content, numbered)


def _located(content: dict[str, Any], numbered: Callable[[str], list[str]]) -> dict[str, Any]:
    """A mapping with numbers in place of the files that it names."""

    def function(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: function(item) for key, item in value.items()}
        if isinstance(value, list):
            return [function(item) for item in value]
        if not isinstance(value, str) or not value.startswith(FUNCTION):
            return value
        module, _, name = value.removeprefix(FUNCTION).rpartition(".")
        return f"{FUNCTION}{numbered(f'{module}.py')[0]}.{name}"

    def data(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: data(item) for key, item in value.items()}
        if isinstance(value, list):
            return [number for item in value for number in numbered(str(item))]
        found = numbered(str(value))
        return found[0] if len(found) == 1 else found

    content = function(content)
    options = content.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        content["dataset_kwargs"] = options | {"data_files": data(options["data_files"])}
    return content


def _refuse_folders(uri: str, folder: str, content: dict[str, Any]) -> None:
    """Refuse data that would be read from where they lie, without being noticed if they change."""
    path, options = content.get("dataset_path"), content.get("dataset_kwargs") or {}
    local = isinstance(path, str) and (path[:1] in ("/", ".", "~") or "://" in path)
    if isinstance(path, str) and (local or exists(beside(folder, path))):
        found = f"`dataset_path: {path}`"
    elif isinstance(options, dict) and "data_dir" in options:
        found = f"`data_dir: {options['data_dir']}`"
    else:
        return
    raise SpecError(
        f"`evaluate.tasks`: {uri}: {found} is a folder of data: name its files, as in "
        "`dataset_path: json` (parquet, csv) and `dataset_kwargs: {data_files: {test: ...}}`"
    )


def beside(folder: str, name: str) -> str:
    """A path relative to a folder; an absolute one as it is."""
    if "://" in name or name.startswith("/"):
        return name
    scheme, mark, path = folder.rpartition("://")
    return f"{scheme}{mark}{posixpath.normpath(posixpath.join(path, name))}"


class _TaskFileLoader(yaml.SafeLoader):
    """Reads `!function module.name` as that text."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return f"!{suffix} {getattr(node, 'value', '')}"


_TaskFileLoader.add_multi_constructor("!", _tagged)


def _read(uri: str) -> dict[str, Any]:
    try:
        content = _TaskFileLoader(read_bytes(uri)).get_single_data()
    except yaml.YAMLError as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise SpecError(f"`evaluate.tasks`: {uri} is no YAML: {reason}") from None
    except FileNotFoundError:
        raise InputError(f"`evaluate.tasks`: {uri} does not exist") from None
    if not isinstance(content, dict):
        raise SpecError(f"`evaluate.tasks`: {uri} is no YAML mapping")
    return content
