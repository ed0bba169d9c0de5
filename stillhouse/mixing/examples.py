"""Rows of tasks and texts: what lies in the files that arms and targets name.

Two forms, told apart by a file's columns (Parquet) or a row's keys (JSON Lines):

* text to text: `input`, `target` and, where there is a fixed set of answers, `choices`;
* plain text: `text`, to be predicted from its beginning.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from stillhouse.errors import InputError
from stillhouse.spec import DataSource
from stillhouse.storage.filesystem import open_read
from stillhouse.storage.parquet import open_parquet
from stillhouse.text.records import decompressed, format_of, naming_bad_file

_BATCH_ROWS = 256
_COLUMNS = ("input", "target", "choices", "text", "split")


@dataclass(frozen=True, slots=True)
class Example:
    """One usable row.

    Attributes:
        input: what is read; empty for plain text.
        target: what is predicted.
        choices: the possible targets; empty for free text.
        split: what the column `split` says, or "".
        group: value of the column that makes arms of a file, or "".
    """

    input: str
    target: str
    choices: tuple[str, ...] = ()
    split: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    row: int
    reason: str
    group: str = ""


def read_examples(
    uri: str, *, where: Mapping[str, str], by: str | None = None
) -> Iterator[Example | BadRow]:
    """The rows of a file whose columns have the values of `where`, in order.

    Args:
        uri: Parquet, JSON Lines (plain, gz, zst), or one plain text.
        where: column and value, compared as text.
        by: the column whose value is the row's `group`.

    Raises:
        InputError: a column that is missing. BadFileError: the file cannot be read.
    """
    for row, record in enumerate(_records(uri, {*where, *([by] if by else [])})):
        group = "" if by is None else str(record.get(by))
        if all(str(record.get(key)) == value for key, value in where.items()):
            yield _judge(row, record, group)


def _judge(row: int, record: Mapping[str, Any], group: str) -> Example | BadRow:
    if "broken" in record:
        return BadRow(row, record["broken"], group)
    split = str(record.get("split") or "")
    if "target" not in record:
        if record.get("choices") is not None:
            return BadRow(row, "`choices` without `target`", group)
        text = record.get("text")
        reason = _fault("text", text)
        return BadRow(row, reason, group) if reason else Example("", str(text), (), split, group)
    given, target, choices = record.get("input"), record["target"], record.get("choices")
    if target is None and choices is not None:
        return BadRow(row, "`choices` without `target`", group)
    reason = _fault("input", given) or _fault("target", target)
    if reason is None and choices is not None:
        reason = _choices_fault(choices, str(target))
    if reason is not None:
        return BadRow(row, reason, group)
    return Example(str(given), str(target), tuple(choices or ()), split, group)


def _fault(name: str, text: Any) -> str | None:
    if text is None:
        return f"no `{name}`"
    if not isinstance(text, str):
        return f"`{name}` is not a string but {type(text).__name__}"
    return None if text.strip() else f"empty `{name}`"


def _choices_fault(choices: Any, target: str) -> str | None:
    if not isinstance(choices, list) or not all(
        isinstance(choice, str)
        for choice in choices  # pyright: ignore[reportUnknownVariableType]
    ):
        return "`choices` is not a list of strings"
    found = cast(list[str], choices)
    if not found:
        return None
    if len(set(found)) != len(found):
        return "two equal `choices`"
    return None if target in found else "`target` is none of its `choices`"


def _records(uri: str, needed: set[str]) -> Iterator[Mapping[str, Any]]:
    kind = format_of(uri, DataSource(path=uri))
    with open_read(uri) as stream, naming_bad_file(uri):
        if kind == "parquet":
            with open_parquet(stream) as parquet:
                names = parquet.schema_arrow.names
                _check_columns(uri, names, needed)
                used = [name for name in names if name in needed or name in _COLUMNS]
                for batch in parquet.iter_batches(_BATCH_ROWS, columns=used):
                    yield from batch.to_pylist()
        elif kind == "jsonl":
            for line in decompressed(uri, stream):
                if line.strip():
                    yield _parsed(line)
        else:
            yield {"text": decompressed(uri, stream).read().decode("utf-8-sig", "replace")}


def _check_columns(uri: str, names: Sequence[str], needed: set[str]) -> None:
    missing = sorted(needed - {*names})
    if missing:
        raise InputError(f"{uri}: no column {missing} (`where`, `by`); it has {', '.join(names)}")
    if "choices" in names and "target" not in names:
        raise InputError(f"{uri}: `choices` without a column `target`: add it, or drop `choices`")
    if "text" not in names and not {"input", "target"} <= {*names}:
        raise InputError(
            f"{uri}: neither `input` and `target` nor `text` among its columns {', '.join(names)}"
        )


def _parsed(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {"broken": f"broken JSON: {error}"[:200]}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {"broken": "not an object"}
