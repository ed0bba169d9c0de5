"""The few-shot target, and how models are evaluated on it: as FLAD publishes it, the choice with
the least mean token loss is the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from stillhouse.errors import InputError
from stillhouse.mixing.arms import Ids, Row
from stillhouse.mixing.batches import Collator, token_losses
from stillhouse.training.group import WorkerGroup

_BATCH = 32
_Z = 1.959963984540054  # of 95 %


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of some rows.

    Attributes:
        nll: mean over the predicted tokens of all targets, in nats.
        accuracy: share of rows whose best choice is the target; None without choices.
        interval: of accuracy, Wilson's at 95 %.
        num_rows: how many.
        chance: accuracy of a guess among each row's choices; None without choices.
    """

    nll: float
    accuracy: float | None
    interval: tuple[float, float] | None
    num_rows: int
    chance: float | None = None

    @property
    def score(self) -> float:
        """Lower is better: by accuracy where there are choices, ties by loss."""
        return self.nll - (1e3 * self.accuracy if self.accuracy is not None else 0.0)


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


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    collate: Collator,
    rows: Sequence[TargetRow],
    *,
    device: torch.device,
    group: WorkerGroup,
) -> Evaluation:
    """Measure a model in float32; whole batches go to the workers, all of which have to ask."""
    wanted = [(i, c, v) for i, row in enumerate(rows) for c, v in enumerate(_variants(row))]
    wanted.sort(key=lambda w: (len(w[2].input_ids), len(w[2].target_ids), w[0], w[1]))
    batches = [wanted[i : i + _BATCH] for i in range(0, len(wanted), _BATCH)]
    training = model.training
    model.eval()
    found: list[tuple[int, int, float, int]] = []
    for batch in batches[group.rank :: group.size]:
        nll, mask = token_losses(model, collate([v for _, _, v in batch]).to(device))
        sums = zip(nll.sum(1).tolist(), mask.sum(1).tolist(), strict=True)
        found += [(i, c, n, t) for (i, c, _), (n, t) in zip(batch, sums, strict=True)]
    model.train(training)
    return _evaluation(rows, sorted(item for part in group.gather(found) for item in part))


def _variants(row: TargetRow) -> list[Row]:
    """The row with each of its choices, or as it is."""
    return [Row(row.row.input_ids, choice) for choice in row.choices] or [row.row]


def _evaluation(
    rows: Sequence[TargetRow], found: Sequence[tuple[int, int, float, int]]
) -> Evaluation:
    """From the row, choice, NLL and tokens of each variant, sorted."""
    losses: list[list[tuple[float, int]]] = [[] for _ in rows]
    for i, _, nll, tokens in found:
        losses[i].append((nll, tokens))
    own = [found[max(row.answer, 0)] for row, found in zip(rows, losses, strict=True)]
    nll = sum(n for n, _ in own) / sum(t for _, t in own)
    ranked = [
        min(range(len(of)), key=lambda c, of=of: of[c][0] / of[c][1]) == row.answer
        for row, of in zip(rows, losses, strict=True)
        if row.choices
    ]
    if not ranked:
        return Evaluation(nll, None, None, len(rows))
    correct, total = sum(ranked), len(ranked)
    chance = sum(1 / len(row.choices) for row in rows if row.choices) / total
    return Evaluation(nll, correct / total, wilson(correct, total), len(rows), chance)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, z2 = correct / total, _Z**2
    middle = share + z2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (middle - spread) / (1 + z2 / total), (middle + spread) / (1 + z2 / total)
