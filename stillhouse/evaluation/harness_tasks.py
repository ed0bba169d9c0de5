"""Tasks as lm-evaluation-harness takes them: names, task files, and rows of one's own."""

import json
import logging
import os
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any

import yaml

from stillhouse.errors import InputError, ModelError, StillhouseError
from stillhouse.evaluation.task_files import FILE, FUNCTION
from stillhouse.evaluation.tasks import TaskSource
from stillhouse.fingerprint import canonical_json
from stillhouse.mixing.preparation import BadRow, Example, read_examples
from stillhouse.settings import allowed_rows
from stillhouse.storage.filesystem import read_bytes

EXAMPLES, MEASURED = "train", "test"


def named_error(name: str, error: Exception) -> Exception:
    """The error of the harness under the task's name."""
    if isinstance(error, StillhouseError):
        return error
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ModelError(f"`evaluate.tasks`: {name}: the harness ended with: {reason}")


def check_task(asked: tuple[TaskSource, int | None]) -> str | None:
    """What is wrong with a task, before anything is trained; None if nothing is.

    Run on a worker, with the number of examples before each row. Files are read, and the task is
    made; of a name it is looked up alone.
    """
    source, shots = asked
    if source.kind == "name":
        with quiet():
            known = _all_tasks().all_tasks
        if source.name in known:
            return None
        close = get_close_matches(source.name, known, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else ": `lm-eval ls tasks` lists them"
        return f"{source.name!r} is neither a task of lm-evaluation-harness nor a file{hint}"
    try:
        with TemporaryDirectory() as folder, quiet():
            made = asked_task(source, Path(folder))
            made.manager.load([made.task])
    except Exception as error:
        return str(named_error(source.name, error)).removeprefix("`evaluate.tasks`: ")
    if shots and source.kind == "rows" and shots >= made.num_examples:
        return (
            f"{source.name}: `num_fewshot: {shots}` needs more than {made.num_examples:,} rows to "
            "take examples from"
        )
    return None


@dataclass(frozen=True, slots=True)
class AskedTask:
    """What the harness takes for a task.

    Attributes:
        task: its name or configuration.
        manager: knows the task.
        measured: its rows, where they are ours.
        num_examples: rows that `num_fewshot` are drawn from, the measured one among them or not.
        unusable: rows by reason.
    """

    task: Any
    manager: Any
    measured: Sequence[Example] = ()
    num_examples: int = 0
    unusable: dict[str, int] = field(default_factory=dict[str, int])


def asked_task(source: TaskSource, folder: Path) -> AskedTask:
    """A task as the harness takes it; files are put into `folder`."""
    from lm_eval.tasks import TaskManager

    if source.kind == "name":
        return AskedTask(source.name, _all_tasks())
    if source.kind == "yaml":
        place = _put_task_file(source, folder)
        return AskedTask(source.name, TaskManager(include_path=place, include_defaults=False))
    return _rows_task(source, folder, TaskManager(include_defaults=False))


@cache
def _all_tasks() -> Any:
    """The manager of the harness's own tasks, which reads their thousands of files once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _put_task_file(source: TaskSource, folder: Path) -> str:
    """A task file beside copies of the files that it names; the folder that they are in."""
    place = folder / "task"
    place.mkdir()
    copies: list[Path] = []
    for number, uri in enumerate(source.uris):
        suffixes = "".join(PurePosixPath(uri.rpartition("#")[0] or uri).suffixes)
        copies.append(place / f"file{number}{suffixes}")
        copies[-1].write_bytes(read_bytes(uri))
    content = _with_copies(json.loads(source.content), copies)
    if "data_files" in content.get("dataset_kwargs", {}):
        content["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
    (place / "task.yaml").write_text(yaml.dump(content, Dumper=_TaskFileDumper))
    return str(place)


class _Function(str):
    """The name of a function, which YAML marks."""


class _TaskFileDumper(yaml.SafeDumper):
    """Writes functions as the harness reads them."""


def _represented(dumper: yaml.SafeDumper, value: _Function) -> yaml.Node:
    return dumper.represent_scalar(FUNCTION.strip(), str(value))


_TaskFileDumper.add_representer(_Function, _represented)


def _with_copies(value: Any, copies: Sequence[Path]) -> Any:
    """A task file's mapping with copies in place of numbers."""
    if isinstance(value, dict):
        return {key: _with_copies(item, copies) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_copies(item, copies) for item in value]
    if isinstance(value, str) and value.startswith(FUNCTION):
        module, _, name = value.removeprefix(FUNCTION + FILE).rpartition(".")
        return _Function(f"{copies[int(module)].stem}.{name}")
    if isinstance(value, str) and value.removeprefix(FILE).isdecimal() and value.startswith(FILE):
        return str(copies[int(value.removeprefix(FILE))])
    return value


def _rows_task(source: TaskSource, folder: Path, manager: Any) -> AskedTask:
    """Rows as a task: choices are ranked, targets without choices and texts rated.

    Raises:
        InputError: more unusable rows than allowed, or none else; rows of several forms.
    """
    examples, unusable = _examples(source)
    bad = unusable.total()
    if not examples or bad > allowed_rows(source.max_bad_rows, bad + len(examples)):
        reasons = "; ".join(f"{n:,}: {why}" for why, n in sorted(unusable.items())) or "none there"
        raise InputError(
            f"`evaluate.tasks`: {source.name}: {bad:,} of {bad + len(examples):,} rows cannot be "
            f"used (`max_bad_rows`): {reasons}"
        )
    forms = {("choices" if one.choices else "target" if one.input else "text") for one in examples}
    if len(forms) > 1:
        raise InputError(
            f"`evaluate.tasks`: {source.name}: rows of several forms ({', '.join(sorted(forms))}):"
            " make each a task of its own, by `where`"
        )
    measured = [one for one in examples if one.split == MEASURED]
    others = [one for one in examples if one.split != MEASURED] if measured else []
    measured = measured or examples
    files = {MEASURED: measured} | ({EXAMPLES: others} if others else {})
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_bytes(b"\n".join(map(_row, rows)))
    config = {
        "task": source.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in files},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": MEASURED,
        "fewshot_split": EXAMPLES if others else MEASURED,
        "doc_to_text": "input",
        "doc_to_target": "target",
        **_FORMS[forms.pop()],
    }
    num_examples = len(others) + 1 if others else len(measured)
    return AskedTask(config, manager, measured, num_examples, dict(unusable))


def _metric(name: str, *, higher: bool, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


_FORMS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [_metric("acc", higher=True), _metric("acc_norm", higher=True)],
    },
    "target": {
        "output_type": "loglikelihood",
        "target_delimiter": "",  # the harness puts none there: `_row` does
        "metric_list": [
            _metric("acc", higher=True),
            _metric("perplexity", higher=False, aggregation="perplexity"),
        ],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "metric_list": [
            _metric(name, higher=False, aggregation=kind)
            for name, kind in (
                ("bits_per_byte", "bits_per_byte"),
                ("byte_perplexity", "weighted_perplexity"),
            )
        ],
    },
}


def _row(example: Example) -> bytes:
    row: dict[str, Any] = {"input": example.input, "target": example.target}
    if example.choices:
        answer = example.choices.index(example.target)
        row |= {"choices": list(example.choices), "answer": answer}
    elif example.input:
        row["target"] = f" {example.target}"
    return canonical_json(row)


def _examples(source: TaskSource) -> tuple[list[Example], Counter[str]]:
    """The usable rows, and how many others there are by reason."""
    read = partial(read_examples, where=source.where or {}, reader=source.reader)
    rows = [row for uri in source.uris for row in read(uri)]
    examples = [row for row in rows if isinstance(row, Example)]
    return examples, Counter(row.reason for row in rows if isinstance(row, BadRow))


_ONE = RLock()
_SWITCHES = ("DISABLE_MULTIPROC", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that the harness, `datasets` and tqdm read, the last two at import."""


@contextmanager
def quiet() -> Generator[None]:
    """Warnings and progress bars of the harness off; it makes no processes of its own. One thread
    at a time: a worker checks two tasks at once, for which the harness is not made.
    """
    with _ONE, _without_output():
        yield


@contextmanager
def _without_output() -> Generator[None]:
    names = ("lm_eval", "lm-eval", "datasets")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    kept = {key: os.environ.get(key) for key in _SWITCHES}
    os.environ.update(dict.fromkeys(_SWITCHES, "1"))
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in kept.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
