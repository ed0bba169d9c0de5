"""Rows of tasks and texts: what lies in the files that arms and targets name.

Two forms, told apart by a file's columns (Parquet) or a row's keys (JSON Lines):

* text to text: `input`, `target` and, where there is a fixed set of answers, `choices`;
* plain text: `text`, to be predicted from its beginning.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pyarrow as pa

from stillhouse.errors import InputError
from stillhouse.text.records import Record, read_records
from stillhouse.text.values import ABSENT, as_text, column_of, find, label, text_fault

_MAX_CHARS = 10_000_000
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
        uri: Parquet, JSON, or one plain text.
        where: column and value, compared as text.
        by: the column whose value is the row's `group`.

    Raises:
        InputError: a column that is missing. BadFileError: the file cannot be read.
    """
    needed = list(where)
    if by is not None and by not in where:
        needed.append(by)
    absent, row = set(needed), -1
    columns = partial(_columns, uri, needed)
    for record in read_records(uri, columns, text="text", max_chars=_MAX_CHARS):
        row = record.row
        absent -= {key for key in absent if find(record.values, key) is not ABSENT}
        try:
            labels = {key: label(find(record.values, key)) for key in needed}
        except ValueError as error:
            yield BadRow(record.row, f"no label in `where` or `by`: {error}")
            continue
        if record.broken is None and any(labels[key] != where[key] for key in where):
            continue
        group = labels[by] if by else ""
        if by and record.broken is None and not group:
            yield BadRow(record.row, f"no value of `{by}` (`by`)")
            continue
        try:
            yield _example(record, group)
        except ValueError as error:
            yield BadRow(record.row, str(error), group)
    if absent and row >= 0:
        raise InputError(f"{uri}: no row has the key {sorted(absent)} (`where`, `by`)")


def _example(record: Record, group: str) -> Example:
    """The row as an example.

    Raises:
        ValueError: why it cannot be used.
    """
    if record.broken is not None:
        raise ValueError(record.broken)
    values, choices = record.values, record.values.get("choices")
    split = label(values.get("split"))
    if values.get("target") is None and choices is not None:
        raise ValueError("`choices` without `target`")
    if "target" not in values:
        return Example("", _text(values, "text"), (), split, group)
    read, target = _text(values, "input"), _text(values, "target")
    return Example(read, target, _choices(choices, target), split, group)


def _text(values: Mapping[str, Any], name: str) -> str:
    text = as_text(values.get(name))
    if text is None:
        raise ValueError(f"no `{name}`")
    fault = text_fault(f"`{name}`", text)
    if fault is not None:
        raise ValueError(fault)
    if not text.strip():
        raise ValueError(f"empty `{name}`")
    return text


def _choices(choices: Any, target: str) -> tuple[str, ...]:
    if choices is None:
        return ()
    if not isinstance(choices, list):
        raise ValueError("`choices` is not a list of strings")
    found = [as_text(choice) for choice in cast(list[Any], choices)]
    if any(text_fault("", choice) is not None for choice in found):
        raise ValueError("`choices` is not a list of strings")
    if len(set(found)) != len(found):
        raise ValueError("two equal `choices`")
    if found and target not in found:
        raise ValueError("`target` is none of its `choices`")
    return tuple(found)


def _columns(uri: str, needed: Sequence[str], schema: pa.Schema) -> list[str]:
    """The columns that are read of a Parquet file."""
    names = schema.names
    missing = [path for path in needed if column_of(schema, path) is None]
    if missing:
        raise InputError(f"{uri}: no column {missing} (`where`, `by`); it has {', '.join(names)}")
    if "choices" in names and "target" not in names:
        raise InputError(f"{uri}: `choices` without a column `target`: add it, or drop `choices`")
    if "text" not in names and not {"input", "target"} <= {*names}:
        raise InputError(
            f"{uri}: neither `input` and `target` nor `text` among its columns {', '.join(names)}"
        )
    return list(dict.fromkeys([*(name for name in _COLUMNS if name in names), *needed]))
