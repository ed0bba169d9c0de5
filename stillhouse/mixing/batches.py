"""Micro-batches: which worker takes which, their losses in nats, and evaluation on the target.

The G slots of a step, sorted by arm, are cut into one contiguous range for each of N workers. So at
most N - 1 arms are shared between workers, and only their gradients have to be communicated.

    encoder_decoder    encoder reads: input EOS          decoder predicts: target EOS
    decoder            reads: [BOS] input target EOS     predicts: target EOS (plain text: all)

A batch's shape depends on its own rows alone, so that a micro-batch is the same computation on any
worker. As FLAD evaluates, the choice with the least mean token loss is the answer.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.errors import InputError
from stillhouse.mixing.arms import Ids, Row
from stillhouse.training.group import WorkerGroup

TaskBatch: TypeAlias = dict[str, Tensor]
IGNORED = -100
_MULTIPLE = 8
_BATCH = 32
_Z = 1.959963984540054  # of 95 %


class Slot(NamedTuple):
    """One micro-batch of a step; `batch` is its number in the arm's stream."""

    arm: int
    number: int
    batch: int


def slots_of(arms: Sequence[int], drawn: Mapping[int, int]) -> list[Slot]:
    """A step's slots sorted by arm; `drawn` has each arm's micro-batches before the step."""
    position, slots = Counter(drawn), list[Slot]()
    for number, arm in enumerate(arms):
        slots.append(Slot(arm, number, position[arm]))
        position[arm] += 1
    return sorted(slots)


def share(count: int, rank: int, size: int) -> range:
    """The part of range(count) that worker `rank` of `size` takes; sizes differ by at most one."""
    return range(count * rank // size, count * (rank + 1) // size)


def shared_arms(slots: Sequence[Slot], size: int) -> list[int]:
    """The arms whose slots are divided between workers, ascending."""
    ranks = [rank for rank in range(size) for _ in share(len(slots), rank, size)]
    pairs = {(slot.arm, rank) for slot, rank in zip(slots, ranks, strict=True)}
    return sorted(arm for arm, count in Counter(arm for arm, _ in pairs).items() if count > 1)


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches for one kind of model; `bos_id` is prepended to what a decoder reads.

    A batch is `input_ids`, `attention_mask`: int64 [B, S]; `labels`: int64 [B, T], -100 where
    nothing is predicted. For a decoder T = S, and labels[b, t] is the token at t, predicted from
    before it.
    """

    encoder_decoder: bool
    eos_id: int
    pad_id: int
    bos_id: int | None = None

    def __call__(self, rows: Sequence[Row], device: torch.device | None = None) -> TaskBatch:
        eos = np.array([self.eos_id], np.int32)
        targets = [np.concatenate([row.target_ids, eos]) for row in rows]
        if self.encoder_decoder:
            inputs = [np.concatenate([row.input_ids, eos]) for row in rows]
            labels = targets
        else:
            bos = np.array([] if self.bos_id is None else [self.bos_id], np.int32)
            prompts = [np.concatenate([bos, row.input_ids]) for row in rows]
            pairs = list(zip(prompts, targets, strict=True))
            inputs = [np.concatenate(pair) for pair in pairs]
            labels = [np.concatenate([np.full(len(p), IGNORED), target]) for p, target in pairs]
        mask = [np.ones(len(ids), np.int32) for ids in inputs]
        batch = {
            "input_ids": _padded(inputs, self.pad_id),
            "attention_mask": _padded(mask, 0),
            "labels": _padded(labels, IGNORED),
        }
        return {name: torch.from_numpy(ids).to(device) for name, ids in batch.items()}


def _padded(rows: Sequence[Ids], value: int) -> NDArray[np.int64]:
    longest = max(len(row) for row in rows)
    filled = np.full((len(rows), -(-longest // _MULTIPLE) * _MULTIPLE), value, np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled


def token_losses(model: PreTrainedModel, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """NLL of each predicted token, 0 elsewhere: float32 [B, T], and the mask bool [B, T]."""
    network: Any = model
    inputs = {name: ids for name, ids in batch.items() if name != "labels"}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        shifted = network.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = network(**inputs, decoder_input_ids=shifted, use_cache=False).logits
    else:
        logits = network(**inputs, use_cache=False).logits[:, :-1]
        labels = labels[:, 1:]
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape), labels != IGNORED


@dataclass(frozen=True, slots=True)
class Shots:
    """One seed's rows: half the shots train, half validate; `test` is for measuring only."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def choose_shots(target: pa.Table, *, num_shots: int, seed: int) -> Shots:
    """Draw `num_shots` rows of a target's part (`TARGET_SCHEMA`) that are not for testing.

    Raises:
        InputError: no row for testing, or fewer rows than shots.
    """
    test: list[Row] = []
    pool: list[Row] = []
    for record in target.to_pylist():
        ids, target = (np.array(record[name], np.int32) for name in ("input_ids", "target_ids"))
        choices = tuple(np.array(choice, np.int32) for choice in record["choices"] or ())
        of_split = test if record["split"] == "test" else pool
        of_split.append(Row(ids, target, choices, record["answer"]))
    if not test:
        raise InputError("`target` has no rows whose column `split` is `test`: nothing to measure")
    if len(pool) < num_shots:
        raise InputError(
            f"`target` has {len(pool)} rows beside those of the split `test`, fewer than "
            f"`target.num_shots` {num_shots}"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(pool))[:num_shots]
    half = (num_shots + 1) // 2
    shots = [pool[i] for i in order]
    return Shots(shots[:half], shots[half:], test)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model does on some rows.

    Attributes:
        nll: mean over the predicted tokens of all targets, in nats.
        accuracy: share of rows whose best choice is the target; None without choices.
        interval: Wilson's 95 % interval of the accuracy.
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


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    collate: Collator,
    rows: Sequence[Row],
    *,
    device: torch.device,
    group: WorkerGroup,
) -> Evaluation:
    """Evaluate in float32; a collective call that deals whole batches to the workers."""
    variants = [
        (row_number, choice_number, Row(row.input_ids, ids))
        for row_number, row in enumerate(rows)
        for choice_number, ids in enumerate(row.choices or (row.target_ids,))
    ]
    variants.sort(key=lambda v: (len(v[2].input_ids), len(v[2].target_ids), v[0], v[1]))
    batches = [variants[i : i + _BATCH] for i in range(0, len(variants), _BATCH)]
    was_training = model.training
    model.eval()
    measured: list[tuple[int, int, float, int]] = []  # row, choice, NLL, tokens
    for batch in batches[group.rank :: group.size]:
        nll, mask = token_losses(model, collate([row for _, _, row in batch], device))
        sums = zip(nll.sum(1).tolist(), mask.sum(1).tolist(), strict=True)
        measured += [(i, c, n, t) for (i, c, _), (n, t) in zip(batch, sums, strict=True)]
    model.train(was_training)
    losses: list[list[tuple[float, int]]] = [[] for _ in rows]
    for i, _, nll, tokens in sorted(item for part in group.gather(measured) for item in part):
        losses[i].append((nll, tokens))
    return _summarised(rows, losses)


def _summarised(rows: Sequence[Row], losses: Sequence[Sequence[tuple[float, int]]]) -> Evaluation:
    """From NLL and tokens of each row's choices, or of its target where it has none."""
    own = [of_row[max(row.answer, 0)] for row, of_row in zip(rows, losses, strict=True)]
    nll = sum(n for n, _ in own) / sum(t for _, t in own)
    correct = [
        min(range(len(of_row)), key=lambda c, of_row=of_row: of_row[c][0] / of_row[c][1])
        == row.answer
        for row, of_row in zip(rows, losses, strict=True)
        if row.choices
    ]
    if not correct:
        return Evaluation(nll, None, None, len(rows))
    total = len(correct)
    chance = sum(1 / len(row.choices) for row in rows if row.choices) / total
    interval = wilson(sum(correct), total)
    return Evaluation(nll, sum(correct) / total, interval, len(rows), chance)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    share, z2 = correct / total, _Z**2
    middle = share + z2 / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (middle - spread) / (1 + z2 / total), (middle + spread) / (1 + z2 / total)
