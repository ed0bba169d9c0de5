"""Arms and targets as token parts in the store: each row encoded once, shuffled once.

A training never opens an arm's files, only its part, a row group of 256 rows at a time. Because
the rows of a part are in a keyed random order, a row group is a random sample of its arm.

part of an arm:    input_ids, target_ids: list<int32>
part of a target:  the same, and choices: list<list<int32>>, answer: int32, split: string
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from stillhouse.errors import BadFileError, InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ROW_GROUP
from stillhouse.mixing.examples import BadRow, Example, read_examples
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.tokenizer import Tokenizer

_ORDER = 2
"""Version of the order of an arm's rows."""
_BATCH = 512
_TOKENS = pa.list_(pa.int32())
ARM_SCHEMA = pa.schema([("input_ids", _TOKENS), ("target_ids", _TOKENS)])
TARGET_SCHEMA = pa.schema(
    [*ARM_SCHEMA, ("choices", pa.list_(_TOKENS)), ("answer", pa.int32()), ("split", pa.string())]
)


@dataclass(slots=True)
class _Arm:
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class SourceTask(Task):
    """Encode one source of arms, or the target: a part of each arm, whose rows are shuffled once.

    The receipt's `info["arms"]` names the arms and what became of their rows, with `by` under ""
    those that say no arm; an arm without a usable row has no part. A file that cannot be read makes
    `info["broken"]`.

    Attributes:
        name: of the arm; with `by`, of the source, whose arms are named by their values.
        digests, uris: of its files, in order.
        selection, selection_folder: digest and folder of the tokenizer of a selection's sequences;
            None for files.
        tokenizer: digest of the one to encode with.
        max_input, max_target: longest in tokens, EOS not counted; text takes up both.
        split_text: half of a text is input.
        max_examples: of each arm, the first ones; None for all.
    """

    KIND = "arms"
    VERSION = 3
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
    uris: Place[tuple[str, ...]] = ()
    selection_folder: Place[str | None] = None

    def run(self, store: Store, host: Tokenizer, loaded: Any) -> Output:
        """Encode all rows, then shuffle those of each arm."""
        arms: dict[str, _Arm] = defaultdict(_Arm)
        if self.by is None:
            arms[self.name] = _Arm()
        broken = None
        try:
            self._fill(arms, host)
        except (BadFileError, InputError) as error:
            broken = str(error)
        except FileNotFoundError as error:
            broken = f"{error} is missing"
        found = sorted(arms.items())
        tables = [self._table(name, arm) for name, arm in found if arm.rows and broken is None]
        listed = [
            {"name": name, "rows": len(arm.rows), "counts": dict(sorted(arm.counts.items()))}
            for name, arm in found
        ]
        tokens = sum(map(self.tokens_in, tables))
        return Output(tables, {"tokens": tokens}, {"arms": listed, "broken": broken})

    def tokens_in(self, table: pa.Table) -> int:
        """Of inputs and targets."""
        return sum(len(table[name].combine_chunks().values) for name in ARM_SCHEMA.names)

    def _table(self, name: str, arm: _Arm) -> pa.Table:
        """An arm's rows in their order, which follows from the content alone."""
        if self.is_target:
            return pa.Table.from_pylist(arm.rows, schema=TARGET_SCHEMA)
        content = [self.digests, self.where, self.by, self.selection, self.name]
        lengths = [self.max_input, self.max_target, self.split_text, self.max_examples, False]
        source = fingerprint(["arms", _ORDER, content, [self.tokenizer, *lengths]])
        key = int(fingerprint(["arm order", source, name])[:15], 16)
        order = np.random.default_rng(key).permutation(len(arm.rows))
        return pa.Table.from_pylist([arm.rows[i] for i in order], schema=ARM_SCHEMA)

    def _fill(self, arms: dict[str, _Arm], tokenizer: Tokenizer) -> None:
        items = _examples(self)
        while batch := list(islice(items, _BATCH)):
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
            _encode(tokenizer, good, self)


def _examples(task: SourceTask) -> Iterator[Example | BadRow]:
    for uri in task.uris:
        if task.selection_folder is not None:
            yield from _selected_texts(uri, task.selection_folder)
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
    tokenizer = load_tokenizer(tokenizer_folder)
    for ids in token_ids(table):
        for piece in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id)):
            text = tokenizer.decode(piece[piece != tokenizer.eos_id])
            if text.strip():
                yield Example("", text)


def _encode(tokenizer: Tokenizer, examples: Sequence[tuple[_Arm, Example]], to: SourceTask) -> None:
    """Add the rows of examples to their arms."""
    texts = [text for _, e in examples for text in (e.input, e.target, *e.choices)]
    ids = iter(tokenizer.encode_batch(texts))
    for arm, example in examples:
        read, target = next(ids), next(ids)
        choices = [next(ids)[: to.max_target].tolist() for _ in example.choices]
        if example.input:
            if len(read) > to.max_input or len(target) > to.max_target:
                arm.counts["truncated"] += 1
            rows = [_row(read[: to.max_input], target[: to.max_target])]
        else:
            rows = list(_pieces(target, to))
        for row in rows:
            arm.counts["tokens"] += len(row["input_ids"]) + len(row["target_ids"])
            if to.is_target:
                answer = example.choices.index(example.target) if choices else -1
                row |= {"choices": choices, "answer": answer, "split": example.split}
        arm.rows += rows


def _row(input_ids: Any, target_ids: Any) -> dict[str, Any]:
    return {"input_ids": input_ids.tolist(), "target_ids": target_ids.tolist()}


def _pieces(ids: Any, task: SourceTask) -> Iterator[dict[str, Any]]:
    """A text in pieces no longer than the model's; for an encoder the first half is its input."""
    longest = task.max_input + task.max_target
    if task.split_text:
        longest = 2 * min(task.max_input, task.max_target)
    for start in range(0, len(ids), longest):
        piece = ids[start : start + longest]
        if len(piece) > 1:
            middle = len(piece) // 2 if task.split_text else 0
            yield _row(piece[:middle], piece[middle:])
