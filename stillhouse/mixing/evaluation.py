"""Evaluation as FLAD publishes it: the choice with the least mean token loss is the answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stillhouse.mixing.arms import Row
from stillhouse.mixing.collation import Collator
from stillhouse.mixing.target import TargetRow
from stillhouse.mixing.task_loss import measured_losses
from stillhouse.training.group import WorkerGroup

_BATCH = 32
_Z = 1.959963984540054  # of 95 %


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


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    share, z2 = correct / total, _Z**2
    middle = share + z2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (middle - spread) / (1 + z2 / total), (middle + spread) / (1 + z2 / total)


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
        nll, tokens = measured_losses(model, collate([v for _, _, v in batch]).to(device))
        found += [(i, c, n, t) for (i, c, _), n, t in zip(batch, nll, tokens, strict=True)]
    model.train(training)
    return _judged(rows, sorted(item for part in group.gather(found) for item in part))


def _variants(row: TargetRow) -> list[Row]:
    """The row with each of its choices, or as it is."""
    return [Row(row.row.input_ids, choice) for choice in row.choices] or [row.row]


def _judged(rows: Sequence[TargetRow], found: Sequence[tuple[int, int, float, int]]) -> Evaluation:
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
