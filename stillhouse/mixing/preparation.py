"""Arms and targets as token parts in the store: each row encoded once, shuffled once.

A training never opens an arm's files, only its part, a row group of 256 rows at a time. Because
the rows of a part are in a keyed random order, a row group is a random sample of its arm.

part of an arm:    input_ids, target_ids: list<int32>
part of a target:  the same, and choices: list<list<int32>>, answer: int32, split: string
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from stillhouse.errors import BadFileError, InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.examples import BadRow, Example, read_examples
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import Tokenizer

ARM_ROW_GROUP = 256
_BATCH = 512
_TOKENS = pa.list_(pa.int32())
ARM_SCHEMA = pa.schema([("input_ids", _TOKENS), ("target_ids", _TOKENS)])
TARGET_SCHEMA = pa.schema(
    [*ARM_SCHEMA, ("choices", pa.list_(_TOKENS)), ("answer", pa.int32()), ("split", pa.string())]
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Longest input and target in tokens, EOS not counted; text takes up both."""

    input: int
    target: int


@dataclass(frozen=True, slots=True)
class SourceTask:
    """One source of arms to encode. Small plain values.

    Attributes:
        fingerprint: names the result.
        name: of the arm; with `by`, of the source, whose arms are named by their values.
        uris: files, in order.
        selection_tokenizer: folder of the tokenizer of a selection's sequences; None for files.
        max_examples: of each arm, the first ones; None for all.
    """

    fingerprint: str
    name: str
    uris: tuple[str, ...]
    where: dict[str, str]
    by: str | None
    selection_tokenizer: str | None
    lengths: Lengths
    split_text: bool
    max_examples: int | None
    is_target: bool = False


@dataclass(slots=True)
class _Arm:
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def prepare_source(store: Store, tokenizer: Tokenizer, task: SourceTask) -> Receipt:
    """Encode a source: a part of each arm. The receipt's `info["arms"]` names them and what became
    of their rows, with `by` under "" those that say no arm; an arm without a usable row has no
    part. A file that cannot be read makes `info["broken"]`.
    """
    arms: dict[str, _Arm] = defaultdict(_Arm)
    if task.by is None:
        arms[task.name] = _Arm()
    broken = None
    try:
        _fill(arms, tokenizer, task)
    except (BadFileError, InputError) as error:
        broken = str(error)
    except FileNotFoundError as error:
        broken = f"{error} is missing"
    parts, listed = [], []
    for name in sorted(arms):
        arm = arms[name]
        if arm.rows and broken is None:
            path = f"arms/parts/{fingerprint([task.fingerprint, name])}.parquet"
            table = _table(arm.rows, task, name)
            tokens = int(arm.counts["tokens"])
            parts.append(store.put_part(path, table, num_tokens=tokens, row_group=ARM_ROW_GROUP))
        listed.append(
            {"name": name, "rows": len(arm.rows), "counts": dict(sorted(arm.counts.items()))}
        )
    info: dict[str, Any] = {"arms": listed, "broken": broken}
    return store.put_receipt("arms", Receipt(task.fingerprint, tuple(parts), {}, info))


def _table(rows: list[dict[str, Any]], task: SourceTask, name: str) -> pa.Table:
    if task.is_target:
        return pa.Table.from_pylist(rows, schema=TARGET_SCHEMA)
    key = int(fingerprint(["arm order", task.fingerprint, name])[:15], 16)
    order = np.random.default_rng(key).permutation(len(rows))
    return pa.Table.from_pylist([rows[i] for i in order], schema=ARM_SCHEMA)


def _fill(arms: dict[str, _Arm], tokenizer: Tokenizer, task: SourceTask) -> None:
    for batch in _batches(_examples(task)):
        good: list[Example] = []
        for item in batch:
            arm = arms[_arm_name(item, task)]
            if isinstance(item, BadRow):
                arm.counts[f"bad: {item.reason}"] += 1
            elif task.max_examples is None or arm.counts["examples"] < task.max_examples:
                arm.counts["examples"] += 1
                good.append(item)
            else:
                arm.counts["over the cap"] += 1
        for example, rows in zip(good, _encode(tokenizer, good, task, arms), strict=True):
            arms[_arm_name(example, task)].rows += rows


def _arm_name(item: Example | BadRow, task: SourceTask) -> str:
    """With `by` the group, which is "" for rows that cannot say theirs."""
    return task.name if task.by is None else item.group


def _examples(task: SourceTask) -> Iterator[Example | BadRow]:
    for uri in task.uris:
        if task.selection_tokenizer is not None:
            yield from _selected_texts(uri, task.selection_tokenizer)
        else:
            yield from read_examples(uri, where=task.where, by=task.by)


def _selected_texts(uri: str, tokenizer_folder: str) -> Iterator[Example]:
    """The texts of a selection's part: a kept document, or a kept sequence decoded again."""
    from stillhouse.text.pieces import token_ids
    from stillhouse.text.tokenizer import load_tokenizer

    table = read_table(uri)
    if "text" in table.column_names:
        yield from (Example("", text) for text in table["text"].to_pylist() if text)
        return
    words = load_tokenizer(tokenizer_folder)
    for ids in token_ids(table):
        for piece in np.split(ids, np.flatnonzero(ids == words.eos_id)):
            text = words.decode(piece[piece != words.eos_id])
            if text.strip():
                yield Example("", text)


def _encode(
    tokenizer: Tokenizer, examples: Sequence[Example], task: SourceTask, arms: dict[str, _Arm]
) -> list[list[dict[str, Any]]]:
    """Rows of each example."""
    texts = [text for e in examples for text in (e.input, e.target, *e.choices)]
    ids = iter(tokenizer.encode_batch(texts))
    made: list[list[dict[str, Any]]] = []
    for example in examples:
        given, target = next(ids), next(ids)
        choices = [next(ids) for _ in example.choices]
        counts = arms[_arm_name(example, task)].counts
        if not example.input:
            rows = list(_pieces(target, task))
        else:
            rows = [_pair(given, target, task.lengths, counts)]
            if task.is_target:
                answer = example.choices.index(example.target) if choices else -1
                cut = [choice[: task.lengths.target].tolist() for choice in choices]
                rows[0] |= {"choices": cut, "answer": answer}
        for row in rows:
            counts["tokens"] += len(row["input_ids"]) + len(row["target_ids"])
            if task.is_target:
                row.setdefault("answer", -1)
                row["split"] = example.split
        made.append(rows)
    return made


def _pair(given: Any, target: Any, lengths: Lengths, counts: Counter[str]) -> dict[str, Any]:
    if len(given) > lengths.input or len(target) > lengths.target:
        counts["truncated"] += 1
    return {
        "input_ids": given[: lengths.input].tolist(),
        "target_ids": target[: lengths.target].tolist(),
    }


def _pieces(ids: Any, task: SourceTask) -> Iterator[dict[str, Any]]:
    """A text in pieces no longer than the model's; for an encoder the first half is its input."""
    longest = task.lengths.input + task.lengths.target
    if task.split_text:
        longest = 2 * min(task.lengths.input, task.lengths.target)
    for start in range(0, len(ids), longest):
        piece = ids[start : start + longest].tolist()
        if len(piece) > 1:
            middle = len(piece) // 2 if task.split_text else 0
            yield {"input_ids": piece[:middle], "target_ids": piece[middle:]}


def _batches(items: Iterable[Example | BadRow]) -> Iterator[list[Example | BadRow]]:
    iterator = iter(items)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
