"""Tasks of a spec as files with digests; nothing of the harness is imported here."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath

from stillhouse.custom_code import CustomCode
from stillhouse.errors import SpecError
from stillhouse.evaluation.settings import TaskEvaluation, TaskFiles
from stillhouse.evaluation.task_files import read_task_file
from stillhouse.fingerprint import canonical_json
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, list_files
from stillhouse.storage.task import Place
from stillhouse.text.records import list_documents


@dataclass(frozen=True, slots=True)
class TaskSource:
    """A task: rows of files, a task file of the harness with the files it names, or a name alone.

    Attributes:
        name: in results.
        kind: `rows`, `yaml` or `name`.
        digests: sha256 of its files.
        content: of a task file, as JSON (`task_files`).
        where, reader: of rows.
        max_bad_rows: unusable rows that are allowed.
        uris: of the files, in their order.
    """

    name: str
    kind: str
    digests: tuple[str, ...] = ()
    content: str = ""
    where: dict[str, str] | None = None
    reader: str | CustomCode = "auto"
    max_bad_rows: Place[float] = 0.0
    uris: Place[tuple[str, ...]] = ()


@dataclass(frozen=True, slots=True)
class ListedTask:
    """A task whose files are known by name."""

    source: TaskSource
    files: tuple[FileInfo, ...] = ()


def harness_version() -> str | None:
    """The version of lm-evaluation-harness, which defines its own tasks; None if it is not here."""
    with suppress(PackageNotFoundError):
        return version("lm_eval")
    return None


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
    if task.is_yaml:
        [file] = list_files(task.paths, ())
        made = read_task_file(file.uri)
        content = canonical_json(made.content).decode()
        return ListedTask(TaskSource(made.name, "yaml", content=content), tuple(made.files))
    reader = task.reader
    stem = PurePosixPath(task.paths[0].rstrip("/")).name.partition(".")[0]
    source = TaskSource(
        task.name or stem, "rows", where=task.where, reader=reader, max_bad_rows=task.max_bad_rows
    )
    return ListedTask(source, tuple(list_documents(task.paths, reader)))
