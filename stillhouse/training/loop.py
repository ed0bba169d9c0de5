"""The training loop: global batches in micro-batches, one optimiser step each, exact resume."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.errors import DivergedError
from stillhouse.models.causal_lm import choose_dtype
from stillhouse.models.cpu import set_attention, use_onednn_for_float32
from stillhouse.models.scoring import head_weight
from stillhouse.spec import Optimisation
from stillhouse.training.batches import BatchSource
from stillhouse.training.cross_entropy import LossValue, NextTokenLoss
from stillhouse.training.optimisation import learning_rate, make_optimizer
from stillhouse.training.state import TrainingState, pack_state, unpack_state

Loss = Callable[[PreTrainedModel, Tensor], LossValue]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step. `step` counts from 1, `tokens` all tokens so far, `loss` is the NLL in nats."""

    step: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training went through."""

    records: list[StepRecord] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [record.loss for record in self.records]


class Trainer:
    """Trains a model in place. Its state is the whole training: `state_dict`, `load_state_dict`.

    On the CPU, the same inputs and thread count give the same bits, resumed or not.

    Args:
        model: float32 weights; moved to `device`.
        loss: maps model and input_ids [b, T] to means over b * (T-1) tokens; default
            `NextTokenLoss(settings.z_loss)`.

    Raises:
        ModelError: as `head_weight`, with the default loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: BatchSource,
        settings: Optimisation,
        *,
        device: torch.device,
        num_steps: int,
        loss: Loss | None = None,
    ) -> None:
        model.to(device)  # pyright: ignore[reportArgumentType]
        set_attention(model, "auto", device)
        if device.type == "cpu":
            use_onednn_for_float32()
        if loss is None:
            head_weight(model)
        self._model, self._source, self._settings = model, source, settings
        self._device, self._num_steps = device, num_steps
        self._loss = loss or NextTokenLoss(settings.z_loss)
        self._dtype = choose_dtype(settings.dtype, device)
        self._optimizer = make_optimizer(model, settings)
        self._step = self._tokens = 0
        if settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda"):
            model.base_model.compile(dynamic=False)

    def step(self) -> StepRecord:
        """One optimiser step on the next global batch.

        Raises:
            DivergedError: loss or gradient norm is NaN or infinite.
        """
        started = perf_counter()
        rate = learning_rate(self._step, self._num_steps, self._settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        input_ids = self._source.next_batch().input_ids.to(self._device, non_blocking=True)
        loss = self._accumulate(input_ids)
        norm = torch.nn.utils.clip_grad_norm_(
            self._model.parameters(), self._settings.max_grad_norm
        )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        self._tokens += input_ids.numel()
        values = torch.stack([loss, norm]).tolist()  # the step's only wait for the device
        if not all(map(math.isfinite, values)):
            raise DivergedError(
                f"step {self._step} of {self._num_steps}: loss {values[0]}, gradient norm "
                f"{values[1]} at learning rate {rate:.3g}: lower `learning_rate` or raise `warmup`"
            )
        speed = input_ids.numel() / (perf_counter() - started)
        return StepRecord(self._step, self._tokens, values[0], rate, values[1], speed)

    def _accumulate(self, input_ids: Tensor) -> Tensor:
        """Gradients of the mean over the global batch [B, T]; returns the mean NLL."""
        self._model.train()
        total = torch.zeros((), device=self._device)
        for micro in input_ids.split(self._settings.micro_batch or len(input_ids)):
            share = len(micro) / len(input_ids)
            with torch.autocast(
                self._device.type, self._dtype, enabled=self._dtype != torch.float32
            ):
                value = self._loss(self._model, micro)
            (value.objective * share).backward()
            total += value.nll.detach() * share
        return total

    def state_dict(self) -> TrainingState:
        """Weights, moments, step and the place in the stream."""
        progress: dict[str, Any] = {
            "step": self._step,
            "tokens": self._tokens,
            "source": self._source.state_dict(),
        }
        return pack_state(self._model, self._optimizer, progress)

    def load_state_dict(self, state: TrainingState) -> None:
        """Go on from a state of a training with the same model and settings."""
        progress = unpack_state(state, self._model, self._optimizer)
        self._step, self._tokens = progress["step"], progress["tokens"]
        self._source.load_state_dict(progress["source"])


def train(
    model: PreTrainedModel,
    source: BatchSource,
    settings: Optimisation,
    *,
    device: torch.device,
    num_steps: int,
    on_step: Callable[[int], None] | None = None,
    loss: Loss | None = None,
) -> TrainResult:
    """Train `model` in place for `num_steps`; `on_step(step)` is called after each, from 1.

    Raises:
        DivergedError: loss or gradient norm is NaN or infinite.
        ModelError: as `Trainer`.
    """
    trainer = Trainer(model, source, settings, device=device, num_steps=num_steps, loss=loss)
    result = TrainResult()
    for step in range(1, num_steps + 1):
        result.records.append(trainer.step())
        if on_step is not None:
            on_step(step)
    return result
