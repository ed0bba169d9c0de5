"""Tasks of a spec as files with digests; nothing of the harness is imported here."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from stillhouse.custom_code import CustomCode
from stillhouse.errors import InputError, SpecError
from stillhouse.evaluation.settings import YAML_SUFFIXES, TaskEvaluation, TaskFiles
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, join, list_files, read_bytes
from stillhouse.storage.task import Place
from stillhouse.text.formats import ranked_suffixes

_FUNCTION = "!function"


@dataclass(frozen=True, slots=True)
class TaskSource:
    """A task: rows of files, a task file of the harness with the files it names, or a name alone.

    Attributes:
        name: in results.
        kind: `rows`, `yaml` or `name`.
        digests: sha256 of its files.
        files: as they are named: of a task file the names in it, the first its own.
        where, reader: of rows.
        uris: of the files, in their order.
    """

    name: str
    kind: str
    digests: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    where: dict[str, str] | None = None
    reader: str | CustomCode = "auto"
    uris: Place[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class ListedTask:
    """A task whose files are known by name."""

    source: TaskSource
    files: tuple[FileInfo, ...] = ()


def list_tasks(settings: TaskEvaluation) -> list[ListedTask]:
    """The tasks of a spec, their files listed.

    Raises:
        InputError: a path matches nothing. SpecError: two tasks of one name, a task file that is no
            YAML mapping.
    """
    listed = [_list_task(one) for one in settings.tasks]
    names = [one.source.name for one in listed]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"`evaluate.tasks`: two are called {name!r}: give one a `name`")
    return listed


def open_tasks(store: Store, listed: Sequence[ListedTask], *, remember: bool) -> list[TaskSource]:
    """The tasks with the digests of their files."""
    files = list({f.uri: f for one in listed for f in one.files}.values())
    digests = digest_files(store, files, remember=remember) if files else []
    known = {f.uri: d.sha256 for f, d in zip(files, digests, strict=True)}
    return [
        replace(
            one.source,
            digests=tuple(known[f.uri] for f in one.files),
            uris=tuple(f.uri for f in one.files),
        )
        for one in listed
    ]


def _list_task(task: TaskFiles | str) -> ListedTask:
    if isinstance(task, str):
        return ListedTask(TaskSource(task, "name"))
    if not task.is_yaml:
        reader = task.reader
        stem = PurePosixPath(task.paths[0].rstrip("/")).name.partition(".")[0]
        source = TaskSource(task.name or stem, "rows", where=task.where, reader=reader)
        return ListedTask(source, tuple(list_files(task.paths, *ranked_suffixes(reader))))
    return _list_yaml(task.paths[0])


def _list_yaml(path: str) -> ListedTask:
    """A task file, and the files that it names."""
    [file] = list_files([path], YAML_SUFFIXES)
    content = read_task_file(file.uri)
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise SpecError(f"`evaluate.tasks`: {path} is no task file: it has no `task: NAME`")
    names = [file.name, *dict.fromkeys(_named_files(file.uri, content))]
    folder = file.uri.rpartition("/")[0]
    found = [file]
    for name in names[1:]:
        uri = name if "://" in name or name.startswith("/") else join(folder, name)
        try:
            [one] = list_files([uri], (PurePosixPath(name).suffix,))
        except InputError as error:
            raise InputError(f"{path} names {name!r}: {error}") from error
        found.append(one)
    source = TaskSource(content["task"], "yaml", files=tuple(names))
    return ListedTask(source, tuple(found))


def _named_files(uri: str, content: dict[str, Any]) -> Iterator[str]:
    """Files that a task file names: included ones, modules of functions, data files."""
    for value in _strings(content):
        if value.startswith(_FUNCTION):
            yield value.split()[1].rpartition(".")[0] + ".py"
    included = content.get("include")
    for name in [included] if isinstance(included, str) else included or []:
        yield name
        other = join(uri.rpartition("/")[0], name)
        yield from _named_files(other, read_task_file(other))
    options = content.get("dataset_kwargs") or {}
    yield from _strings(options.get("data_files"))


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


class _TaskFileLoader(yaml.SafeLoader):
    """Reads `!function module.name` as that text."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    return f"!{suffix} {getattr(node, 'value', '')}"


_TaskFileLoader.add_multi_constructor("!", _tagged)


def read_task_file(uri: str) -> Any:
    """The content of a task file, functions as text.

    Raises:
        SpecError: no YAML. InputError: no such file.
    """
    try:
        return _TaskFileLoader(read_bytes(uri)).get_single_data()
    except yaml.YAMLError as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise SpecError(f"`evaluate.tasks`: {uri} is no YAML: {reason}") from None
    except FileNotFoundError:
        raise InputError(f"`evaluate.tasks`: {uri} does not exist") from None
