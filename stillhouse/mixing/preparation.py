"""Arms and targets: rows of files as token parts in the store, encoded once, shuffled once.

A file's rows have one of two forms, told apart by its columns (Parquet) or a row's keys (JSON):

* text to text: `input`, `target` and, where there is a fixed set of answers, `choices`;
* plain text: `text`, to be predicted from its beginning.

A training never opens an arm's files, only its part, a row group of 256 rows at a time. The rows
of a part are in a keyed random order, so a row group is a random sample of its arm.

part of an arm:    input_ids, target_ids: list<int32>
part of a target:  the same, and choices: list<list<int32>>, answer: int32, split: string
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa

from stillhouse.custom_code import CustomCode
from stillhouse.errors import BadFileError, InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ROW_GROUP
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.pieces import token_ids
from stillhouse.text.records import read_records
from stillhouse.text.rows.record import Record
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer
from stillhouse.text.values import ABSENT, as_text, column_of, find, label, text_fault

_MAX_CHARS = 10_000_000
_COLUMNS = ("input", "target", "choices", "text", "split")
_ORDER = 2
"""Version of the order of an arm's rows."""
_BATCH = 512
_TOKENS = pa.list_(pa.int32())
ARM_SCHEMA = pa.schema([("input_ids", _TOKENS), ("target_ids", _TOKENS)])
TARGET_SCHEMA = pa.schema(
    [*ARM_SCHEMA, ("choices", pa.list_(_TOKENS)), ("answer", pa.int32()), ("split", pa.string())]
)


@dataclass(frozen=True, slots=True)
class Example:
    """One usable row.

    Attributes:
        input: what is read; empty for plain text.
        target: what is predicted.
        choices: the possible targets; empty for free text.
        split: value of the column `split`, or "".
        group: value of the column that divides the file into arms, or "".
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
    uri: str,
    *,
    where: Mapping[str, str],
    by: str | None = None,
    reader: str | CustomCode = "auto",
) -> Iterator[Example | BadRow]:
    """The rows of a file whose columns have the values of `where`, in order.

    Args:
        uri: Parquet, JSON, or one plain text.
        where: value by column or key of the file's folders, compared as text.
        by: the column whose value is the row's `group`.
        reader: a format, or a reader of the user's.

    Raises:
        InputError: a missing column. BadFileError: the file cannot be read.
    """
    needed = [*where] if by is None or by in where else [*where, by]
    absent, row = {*needed}, -1
    columns = partial(_columns, uri, needed)
    records = read_records(
        uri, columns, text="text", max_chars=_MAX_CHARS, given=reader, keys=needed
    )
    for record in records:
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


def _columns(uri: str, needed: Sequence[str], schema: pa.Schema) -> list[str]:
    """The columns to read of a Parquet file."""
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
    source, target = _text(values, "input"), _text(values, "target")
    return Example(source, target, _choices(choices, target), split, group)


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
    texts = [as_text(c) for c in cast(list[Any], choices)] if isinstance(choices, list) else None
    if texts is None or any(text_fault("", text) for text in texts):
        raise ValueError("`choices` is not a list of strings")
    if len({*texts}) != len(texts):
        raise ValueError("two equal `choices`")
    if texts and target not in texts:
        raise ValueError("`target` is none of its `choices`")
    return tuple(texts)


@dataclass(slots=True)
class _Arm:
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class SourceTask(Task):
    """Encode one source of arms, or the target: a part of each arm, its rows shuffled once.

    The receipt's `info["arms"]` lists the arms and counts their rows by outcome, with `by` under
    "" those of no arm; an arm without a usable row has no part. `info["broken"]` is the reason
    where a file cannot be read.

    Attributes:
        name: of the arm; with `by`, of the source, whose arms are named by their values.
        digests, uris: of its files, in order.
        selection, selection_folder: digest and folder of the tokenizer of a selection's sequences;
            None for files.
        tokenizer: digest of the one to encode with.
        max_input, max_target: maximal lengths in tokens, without EOS; text takes up both.
        split_text: half of a text is input.
        max_examples: of each arm, the first ones; None for all.
        reader: the format of the files, or a reader of the user's.
    """

    KIND = "arms"
    VERSION = 4
    ROW_GROUP = ROW_GROUP

    name: str
    digests: tuple[str, ...]
    where: dict[str, str]
    by: str | None
    selection: str | None
    tokenizer: str
    max_input: int
    max_target: int
    split_text: bool
    max_examples: int | None
    is_target: bool = False
    reader: str | CustomCode = "auto"
    uris: Place[tuple[str, ...]] = ()
    selection_folder: Place[str | None] = None

    def run(self, store: Store, host: Tokenizer, loaded: Any) -> Output:
        arms: dict[str, _Arm] = defaultdict(_Arm)
        if self.by is None:
            arms[self.name] = _Arm()
        broken = None
        try:
            examples = self._examples()
            while batch := list(islice(examples, _BATCH)):
                self._add(arms, batch, host)
        except (BadFileError, InputError) as error:
            broken = str(error)
        except FileNotFoundError as error:
            broken = f"{error} is missing"
        by_name = sorted(arms.items())
        tables = [self._table(name, arm) for name, arm in by_name if arm.rows and broken is None]
        described = [
            {"name": name, "rows": len(arm.rows), "counts": dict(sorted(arm.counts.items()))}
            for name, arm in by_name
        ]
        tokens = sum(map(self.tokens_in, tables))
        return Output(tables, {"tokens": tokens}, {"arms": described, "broken": broken})

    def tokens_in(self, table: pa.Table) -> int:
        return sum(len(table[name].combine_chunks().values) for name in ARM_SCHEMA.names)

    def _table(self, name: str, arm: _Arm) -> pa.Table:
        """An arm's rows in an order that depends on the content alone; a target's as they are."""
        if self.is_target:
            return pa.Table.from_pylist(arm.rows, schema=TARGET_SCHEMA)
        content = [self.digests, self.where, self.by, self.selection, self.name]
        lengths = [self.max_input, self.max_target, self.split_text, self.max_examples, False]
        source = fingerprint(["arms", _ORDER, content, [self.tokenizer, *lengths]])
        key = int(fingerprint(["arm order", source, name])[:15], 16)
        order = np.random.default_rng(key).permutation(len(arm.rows))
        return pa.Table.from_pylist([arm.rows[i] for i in order], schema=ARM_SCHEMA)

    def _examples(self) -> Iterator[Example | BadRow]:
        for uri in self.uris:
            if self.selection_folder is None:
                yield from read_examples(uri, where=self.where, by=self.by, reader=self.reader)
            else:
                yield from _selected_texts(uri, self.selection_folder)

    def _add(
        self, arms: dict[str, _Arm], batch: Sequence[Example | BadRow], tokenizer: Tokenizer
    ) -> None:
        """Encode a batch and add its rows to their arms."""
        good: list[tuple[_Arm, Example]] = []
        for item in batch:
            arm = arms[self.name if self.by is None else item.group]
            if isinstance(item, BadRow):
                arm.counts[f"bad: {item.reason}"] += 1
            elif self.max_examples is None or arm.counts["examples"] < self.max_examples:
                arm.counts["examples"] += 1
                good.append((arm, item))
            else:
                arm.counts["over the cap"] += 1
        texts = [text for _, e in good for text in (e.input, e.target, *e.choices)]
        encoded = iter(tokenizer.encode_batch(texts))
        for arm, example in good:
            source, target = next(encoded), next(encoded)
            choices = [next(encoded)[: self.max_target].tolist() for _ in example.choices]
            pieces = [(source[: self.max_input], target[: self.max_target])]
            if not example.input:
                pieces = self._pieces(target)
            elif len(source) > self.max_input or len(target) > self.max_target:
                arm.counts["truncated"] += 1
            for first, second in pieces:
                arm.counts["tokens"] += len(first) + len(second)
                row: dict[str, Any] = {"input_ids": first.tolist(), "target_ids": second.tolist()}
                if self.is_target:
                    answer = example.choices.index(example.target) if choices else -1
                    row |= {"choices": choices, "answer": answer, "split": example.split}
                arm.rows.append(row)

    def _pieces(self, ids: Any) -> list[tuple[Any, Any]]:
        """A text in pieces no longer than the model's; for an encoder the first half is input."""
        longest = self.max_input + self.max_target
        if self.split_text:
            longest = 2 * min(self.max_input, self.max_target)
        pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        middles = [len(piece) // 2 if self.split_text else 0 for piece in pieces]
        return [(p[:m], p[m:]) for p, m in zip(pieces, middles, strict=True) if len(p) > 1]


def _selected_texts(uri: str, tokenizer_folder: str) -> Iterator[Example]:
    """The texts of a selection's part: kept documents, or kept sequences decoded again."""
    table = read_table(uri)
    if "text" in table.column_names:
        yield from (Example("", text) for text in table["text"].to_pylist() if text)
        return
    tokenizer = load_tokenizer(tokenizer_folder)
    for ids in token_ids(table):
        for piece in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id)):
            text = tokenizer.decode(piece[piece != tokenizer.eos_id])
            if text.strip():
                yield Example("", text)
