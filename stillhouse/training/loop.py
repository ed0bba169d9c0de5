"""The training loop: global batches in micro-batches, one optimiser step each, exact resume."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stillhouse.errors import DivergedError, SpecError
from stillhouse.models.causal_lm import choose_dtype
from stillhouse.models.device import device_name, peak_flops, use_onednn_for_float32
from stillhouse.spec import Optimisation
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.checkpoint import Snapshot, put_moments, put_snapshot, take_snapshot
from stillhouse.training.evaluate import SourceLoss, SourceLossTally
from stillhouse.training.group import WorkerGroup, shard, whole
from stillhouse.training.learner import LanguageLearner, Learner, MakeObjective
from stillhouse.training.objectives import LossValue
from stillhouse.training.optimisation import LossGuard, learning_rate, make_optimizer
from stillhouse.training.order import NO_SAMPLES, chain
from stillhouse.training.stream import Batch, BatchSource


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of all workers.

    Attributes:
        step: counted from 1.
        tokens: all tokens so far.
        loss: mean NLL in nats.
        tokens_per_s: of all workers.
        seconds, data_wait_s: of the step, and of these this worker's wait for data.
        micro_batch: sequences a forward pass.
        mfu: model FLOPs utilisation, if the device's peak is known. What activation checkpointing
            computes again does not count.
    """

    step: int
    tokens: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    seconds: float
    data_wait_s: float
    micro_batch: int
    mfu: float | None


class Trainer:
    """Trains a model in place. Its state is the whole training: `snapshot`, `restore`.

    On the CPU, equal inputs and thread counts give equal bits, resumed or not. With several workers
    each has a trainer, whose source gives it its rows of every global batch; losses agree with
    those of one worker up to float32 rounding.

    Out of memory halves the micro-batch for good, unless the model is sharded; the global batch
    stays.

    Args:
        model: float32 weights, the same on all workers; moved to `device`.
        objective: makes the loss; default that of the learner.
        learner: the kind of model; `options` are its further arguments.
        group: the workers.
        stop_on_explosion: also stop if the loss explodes (`LossGuard`).

    Raises:
        ModelError: as the learner.
    """

    def __init__(
        self,
        model: nn.Module,
        source: BatchSource,
        settings: Optimisation,
        *,
        device: torch.device,
        num_steps: int,
        objective: MakeObjective | None = None,
        learner: Callable[..., Learner] = LanguageLearner,
        group: WorkerGroup | None = None,
        stop_on_explosion: bool = False,
        **options: Any,
    ) -> None:
        model.to(device)
        if device.type == "cpu":
            use_onednn_for_float32()
        self._group = group or WorkerGroup()
        self._model, self._source, self._settings = model, source, settings
        self._device, self._num_steps = device, num_steps
        self._learner = learner(
            model, objective, settings, device=device, group=self._group, **options
        )
        self._learner.to(device)  # what the objective learns too
        self._objective = self._learner.objective
        self._dtype = choose_dtype(settings.dtype, device)
        self._micro_batch = settings.micro_batch
        self._guard = LossGuard() if stop_on_explosion else None
        self._tally = SourceLossTally()
        self._step = self._tokens = 0
        self._chain = NO_SAMPLES
        self._second: list[Tensor] = []
        bfloat16 = self._dtype == torch.bfloat16
        self._peak = peak_flops(device_name(device)) if bfloat16 else None
        if self._group.sharded:
            if hasattr(self._objective, "survey") or hasattr(self._objective, "join"):
                raise SpecError(
                    "`train.sharding: fsdp`: this objective needs the whole model on every worker"
                )
            shard(self._learner, self._learner.layers, device)
        self._trained = [p for p in self._learner.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(self._learner, settings)

    @property
    def order_sha256(self) -> str:
        """The digest of all samples so far (`stillhouse.training.order.chain`)."""
        return self._chain.hex()

    def step(self) -> StepRecord:
        """One optimiser step on the next global batch.

        Raises:
            DivergedError: loss or gradient norm is NaN or infinite, or the loss exploded.
            torch.OutOfMemoryError, MemoryError: with a single sequence, or a sharded model.
        """
        started = perf_counter()
        rate = learning_rate(self._step, self._num_steps, self._settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._learner.at_step(self._step, self._num_steps)
        batch = self._source.next_batch()
        waited = perf_counter() - started
        batch = self._learner.prepared(batch)
        rows = self._rows(len(batch.inputs))
        ids = self._to_device(batch.inputs)
        signals = {name: self._to_device(values) for name, values in batch.signals.items()}
        nll, token_nll = self._accumulate(ids, signals, rows)
        self._group.sum_gradients(self._trained)
        self._join_second()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        num_tokens = sum(rows) * self._learner.units(ids)
        self._tokens += num_tokens
        self._chain = chain(self._chain, self._group.gather_samples(batch.samples))
        loss, size = torch.stack([self._group.total(nll), whole(norm)]).tolist()
        # the line above is the step's only wait for the device
        if batch.sources is not None and token_nll is not None:
            mask = batch.signals.get(LOSS_MASK)
            mask = None if mask is None else mask.numpy()
            self._tally.add(token_nll.cpu().numpy(), batch.sources, mask)
        self._check(loss, size, rate, batch)
        seconds = perf_counter() - started
        mfu = None
        if self._peak is not None:
            flops = self._learner.flops(ids) * sum(rows)
            mfu = flops / seconds / (self._group.size * self._peak)
        return StepRecord(
            step=self._step,
            tokens=self._tokens,
            loss=loss,
            learning_rate=rate,
            grad_norm=size,
            tokens_per_s=num_tokens / seconds,
            seconds=seconds,
            data_wait_s=waited,
            micro_batch=self._micro(rows),
            mfu=mfu,
        )

    def _rows(self, mine: int) -> list[int]:
        """Rows of a global batch on each worker.

        Raises:
            SpecError: they do not divide into the rows that have to stay together.
        """
        rows, together = self._group.batch_rows(mine), self._learner.rows_together
        if any(count % together for count in rows):
            raise SpecError(
                f"the objective compares {together} consecutive sequences with each other, and the "
                f"workers have {rows} of a batch: `train.global_batch` and each worker's share of "
                f"it have to be multiples of {together}"
            )
        return rows

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _accumulate(
        self, inputs: Tensor, signals: Mapping[str, Tensor], rows: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Accumulate gradients of the mean over the global batch from this worker's rows [b, ...].

        Returns:
            The rows' share of the mean NLL, and the NLL of each token [b, T-1] if it is known.
        """
        counted = None
        if LOSS_MASK in signals:  # a sum over all workers, before any of them may run out of memory
            counted = self._group.total(signals[LOSS_MASK][:, 1:].sum()).clamp(min=1)
        if hasattr(self._objective, "survey"):
            self._objective.learn(self._surveyed(inputs, signals, rows))
        least = self._learner.rows_together
        while True:
            try:
                return self._backward(inputs, signals, rows, counted)
            except (torch.OutOfMemoryError, MemoryError) as error:
                if self._group.sharded or self._micro(rows) <= least:
                    error.add_note(
                        f"step {self._step + 1} with {self._micro(rows)} rows a forward pass: "
                        "lower `micro_batch`, or set `activation_checkpointing`"
                    )
                    raise
            self._optimizer.zero_grad(set_to_none=True)
            self._micro_batch = -(-self._micro(rows) // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _micro(self, rows: list[int]) -> int:
        """Rows a forward pass."""
        together = self._learner.rows_together
        return -(-min(self._micro_batch or max(rows), max(rows)) // together) * together

    @torch.no_grad()
    def _surveyed(self, inputs: Tensor, signals: Mapping[str, Tensor], rows: list[int]) -> Tensor:
        """What the objective asks of every row of the global batch: [B, m] on every worker."""
        self._model.train()  # as in the pass that follows, whatever was before
        values: list[Tensor] = []
        for part in self._micro_batches(len(inputs), rows):
            micro = {name: column[part] for name, column in signals.items()}
            with self._cast():
                values.append(self._learner.survey(inputs[part], micro).float().cpu())
        return self._group.gather_rows(torch.cat(values), rows).to(self._device)

    def _micro_batches(self, count: int, rows: list[int]) -> Iterator[slice]:
        size = self._micro(rows)
        return (slice(start, start + size) for start in range(0, count, size))

    def _backward(
        self,
        inputs: Tensor,
        signals: Mapping[str, Tensor],
        rows: list[int],
        counted: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        self._model.train()
        self._second = []
        total = torch.zeros((), device=self._device)
        token_nll: list[Tensor] = []
        for part in self._micro_batches(len(inputs), rows):
            micro = {name: values[part] for name, values in signals.items()}
            share: float | Tensor = len(inputs[part]) / sum(rows)
            if counted is not None:
                share = micro[LOSS_MASK][:, 1:].sum() / counted
            value = self._forward(inputs[part], micro)
            factor = share * self._group.gradient_factor
            if value.second is not None:
                self._keep_second(value.second * factor)
            (value.objective * factor).backward()
            total += value.nll.detach() * share
            if value.token_nll is not None:
                token_nll.append(value.token_nll.detach())
        if self._group.sharded:  # layers are gathered by all workers: do as many passes as they do
            size, few = self._micro(rows), self._learner.rows_together
            first = {name: values[:few] for name, values in signals.items()}
            for _ in range(-(-len(inputs) // size), -(-max(rows) // size)):
                (self._forward(inputs[:few], first).objective * 0).backward()
        return total, torch.cat(token_nll) if token_nll else None

    def _keep_second(self, loss: Tensor) -> None:
        """Add up the gradients of a second loss, apart from those of the first."""
        found: Any = torch.autograd.grad(loss, self._trained, retain_graph=True, allow_unused=True)
        zeros = self._second or [torch.zeros_like(parameter) for parameter in self._trained]
        pairs = zip(zeros, found, strict=True)
        self._second = [one if more is None else one + more for one, more in pairs]

    def _join_second(self) -> None:
        """Replace the gradients by what the objective makes of those of its two losses."""
        if not self._second:
            return
        self._group.sum_tensors(self._second)
        first = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        joined = self._objective.join(first, self._second)
        for parameter, gradient in zip(self._trained, joined, strict=True):
            parameter.grad = gradient
        self._second = []

    def _forward(self, micro: Tensor, signals: Mapping[str, Tensor]) -> LossValue:
        with self._cast():
            return self._learner(micro, signals)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)

    def _check(self, loss: float, norm: float, rate: float, batch: Batch) -> None:
        """Raise `DivergedError` if the training diverged; the same on all workers."""
        exploded = self._guard is not None and self._guard.exploded(loss)
        if not exploded and math.isfinite(loss) and math.isfinite(norm):
            return
        mine = batch.sources.present() if batch.sources is not None else []
        sources = sorted({name for names in self._group.gather(mine) for name in names})
        mean = f" after a mean of {self._guard.mean:.3g}" if self._guard is not None else ""
        raise DivergedError(
            f"step {self._step} of {self._num_steps}: loss {loss}{mean}, gradient norm {norm} at "
            f"learning rate {rate:.3g}: lower `learning_rate` or raise `warmup`"
            + (f" (sources in the batch: {', '.join(sources)})" if sources else "")
        )

    def counted(self, input_ids: NDArray[Any]) -> NDArray[np.float32] | None:
        """Which tokens of held-out sequences [N, T] have a loss, 1 or 0; None: all."""
        marks = self._learner.counted(torch.from_numpy(input_ids))
        return None if marks is None else marks.numpy()

    def token_nll(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """NLL of each predicted token: integers [N, T] -> float32 [N, T-1], on all workers.

        Each worker computes its share, so all of them call this. The objective has to return
        `token_nll`.
        """
        return self.map_rows(
            lambda ids: self._forward(ids, {}).token_nll, torch.from_numpy(input_ids)
        )

    @torch.no_grad()
    def map_rows(
        self, function: Callable[[Tensor], Tensor | None], inputs: Tensor
    ) -> NDArray[np.float32]:
        """Values [N, ...] of rows [N, ...] in evaluation mode, from all workers' shares."""
        self._model.eval()
        share = -(-len(inputs) // self._group.size)
        first = self._group.rank * share
        mine = torch.arange(first, first + share) % len(inputs)  # the last shares may wrap around
        rows = inputs[mine] if inputs.is_floating_point() else inputs[mine].long()
        size = self._micro_batch or self._settings.batch_size
        values = [function(self._to_device(micro)) for micro in rows.split(size)]
        if self._group.sharded:
            # a forward without backward leaves the root's weights gathered, detached from the
            # optimiser's shards
            root: Any = self._learner
            root.reshard()
        losses = torch.cat([value for value in values if value is not None]).cpu()
        return self._group.gather_blocks(losses)[: len(inputs)].numpy()

    def take_source_losses(self) -> dict[str, SourceLoss]:
        """Training losses by source since the last call; all workers call this together.

        Empty if the batches have no sources, or the objective returns no `token_nll`.
        """
        return self._tally.take(self._group)

    def snapshot(self) -> Snapshot:
        """Weights, moments, step and position in the stream; tensors on the first worker only.

        The workers of a sharded training call this together.
        """
        chosen = self._settings.micro_batch
        progress: dict[str, Any] = {
            "step": self._step,
            "tokens": self._tokens,
            "source": self._source.state_dict(),
            "order_sha256": self.order_sha256,
            "halved_to": None if self._micro_batch == chosen else self._micro_batch,
            "guard": None if self._guard is None else self._guard.state_dict(),
        }
        if self._group.rank and not self._group.sharded:
            return Snapshot({}, progress)
        keep = self._group.rank == 0
        return take_snapshot(self._learner.state, self._optimizer, progress, keep=keep)

    def take_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """Start with the optimiser's moments of another training of the same architecture."""
        put_moments(tensors, self._learner.trained, self._optimizer)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of a training with the same model and settings.

        The number of workers, and sharding, may differ. A micro-batch that was halved stays so.
        """
        put_snapshot(snapshot, self._learner.state, self._optimizer)
        progress = snapshot.progress
        self._step, self._tokens = progress["step"], progress["tokens"]
        self._chain = bytes.fromhex(progress["order_sha256"])
        if self._guard is not None and progress["guard"] is not None:
            self._guard.load_state_dict(progress["guard"])
        self._micro_batch = progress["halved_to"] or self._micro_batch
        self._source.load_state_dict(progress["source"])
