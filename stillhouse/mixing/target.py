"""The few-shot target: which rows are trained on, which decide when to stop, which measure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from stillhouse.errors import InputError
from stillhouse.mixing.arms import Ids, Row


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A row of the target; `choices` in tokens, `answer` the right one's index or -1."""

    row: Row
    choices: tuple[Ids, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Shots:
    """Of one seed: half the shots train, half validate; `test` is for measuring only."""

    train: list[TargetRow]
    validation: list[TargetRow]
    test: list[TargetRow]


def target_rows(table: pa.Table) -> tuple[list[TargetRow], list[str]]:
    """The rows of a target's part, and the split of each."""
    rows: list[TargetRow] = []
    for record in table.to_pylist():
        row = Row(*(np.array(record[name], np.int32) for name in ("input_ids", "target_ids")))
        choices = tuple(np.array(ids, np.int32) for ids in record["choices"] or ())
        rows.append(TargetRow(row, choices, record["answer"]))
    return rows, table["split"].to_pylist()


def choose_shots(
    rows: Sequence[TargetRow], splits: Sequence[str], *, num_shots: int, seed: int
) -> Shots:
    """`num_shots` rows of those that are not for testing, drawn by `seed`, in two halves.

    Raises:
        InputError: no row for testing, or fewer rows than shots.
    """
    test = [row for row, split in zip(rows, splits, strict=True) if split == "test"]
    pool = [row for row, split in zip(rows, splits, strict=True) if split != "test"]
    if not test:
        raise InputError("`target` has no rows whose column `split` is `test`: nothing to measure")
    if len(pool) < num_shots:
        raise InputError(
            f"`target` has {len(pool)} rows beside those of the split `test`, fewer than "
            f"`target.num_shots` {num_shots}"
        )
    chosen = np.random.default_rng([seed, 1]).permutation(len(pool))[:num_shots]
    half = (num_shots + 1) // 2
    shots = [pool[i] for i in chosen]
    return Shots(shots[:half], shots[half:], test)
