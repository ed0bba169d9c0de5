"""Tokens that are hidden from a masked language model (Devlin et al. 2019, section 3.1).

Of the T-1 tokens behind the first one, every sequence has the same share chosen, and they alone are
predicted. The model reads, each time at random,

    the mask token (80 %), any token (10 %), or the chosen token itself (10 %).

Draws depend on the training's seed, the step, and the sequence's part and row: they are the same
for any number of workers and after a resume. Those of held-out sequences depend on their tokens
alone: they are the same at every evaluation, in every training of one rate.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import SpecError
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.stream import Batch

GIVEN = "given_ids"
"""The signal with what the model reads, int64 [B, T]."""
_TRAINED, _HELD_OUT = 15, 16
"""First words of the keys of random generators."""


@dataclass(frozen=True, slots=True)
class Hiding:
    """Chooses tokens and hides them.

    Attributes:
        mask_id: the tokenizer's mask token.
        vocab_size: random tokens are below it.
        rate: share of the tokens that is chosen, at least one a sequence.

    Raises:
        SpecError: a rate that is not between 0 and 1.
    """

    mask_id: int
    vocab_size: int
    rate: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise SpecError(f"`train.objective.rate: {self.rate}` is not between 0 and 1")

    def in_batch(self, batch: Batch, seed: int, step: int) -> Batch:
        """The batch with `GIVEN` and with the chosen tokens as its `loss_mask`: of those that a
        mask marked before, if it had one.
        """
        keys = ([_TRAINED, seed, step, *sample] for sample in batch.samples.tolist())
        given, chosen = self._hidden(batch.inputs, keys)
        if LOSS_MASK in batch.signals:
            chosen = chosen * batch.signals[LOSS_MASK]
        return replace(batch, signals={**batch.signals, GIVEN: given, LOSS_MASK: chosen})

    def held_out(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the model reads of sequences [N, T], and float32 [N, T] that marks chosen tokens."""
        rows = np.ascontiguousarray(input_ids.cpu().numpy(), "<i8")
        digests = (hashlib.sha256(row.tobytes()).digest() for row in rows)
        keys = ([_HELD_OUT, *np.frombuffer(one, "<u4").tolist()] for one in digests)
        given, chosen = self._hidden(input_ids, keys)
        return given.to(input_ids.device), chosen.to(input_ids.device)

    def _hidden(self, input_ids: Tensor, keys: Iterable[Sequence[int]]) -> tuple[Tensor, Tensor]:
        given = input_ids.cpu().numpy().astype(np.int64)
        chosen = np.zeros(given.shape, np.float32)
        for row, marks, key in zip(given, chosen, keys, strict=True):
            self._hide(row, marks, np.random.default_rng(key))
        return torch.from_numpy(given), torch.from_numpy(chosen)

    def _hide(
        self, row: NDArray[np.int64], marks: NDArray[np.float32], generator: np.random.Generator
    ) -> None:
        """Hide tokens of a row [T] in place, and mark them."""
        num = max(1, round(self.rate * (len(row) - 1)))
        at = 1 + generator.permutation(len(row) - 1)[:num]
        draw, other = generator.random(num), generator.integers(self.vocab_size, size=num)
        row[at] = np.where(draw < 0.8, self.mask_id, np.where(draw < 0.9, other, row[at]))
        marks[at] = 1
