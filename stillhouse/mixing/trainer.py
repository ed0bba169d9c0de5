"""One optimiser step of mixing: micro-batches of drawn arms, the target, and the arms' rewards.

    1. target pass (where the policy has one): all M micro-batches of the target's training half
    2. the step's auxiliary micro-batches, each loss divided by their number G
    3. gradients summed over workers, clipped, optimiser step
    4. rewards: gradient of each arm against the target's, on the named parameters

The target's gradient of `before_step` is that of 1: it belongs to the weights that the arms'
gradients belong to, and costs nothing. `after_step`, as published, is a second pass at the
new weights. Both sides of a reward are means over micro-batches.
"""

import math
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import DivergedError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmReader, Row
from stillhouse.mixing.batches import Collator, Slot, share, slots_of, spanning, token_losses
from stillhouse.mixing.evaluation import TargetRow
from stillhouse.mixing.mixer import Draw, Mixer
from stillhouse.mixing.rewards import (
    TARGET,
    Aim,
    BatchLoss,
    GradientCapture,
    clipped_excess,
    compared_parameters,
    loss_rewards,
)
from stillhouse.mixing.task import MixTask
from stillhouse.models.causal_lm import choose_dtype
from stillhouse.training.group import WorkerGroup
from stillhouse.training.optimisation import learning_rate
from stillhouse.training.state import Snapshot, put_snapshot, take_snapshot

_Sums: TypeAlias = tuple[int, int, Tensor]
"""Of one micro-batch: arm, number, and float32 [3]: NLL, tokens, excess."""


class _Step(NamedTuple):
    """A step's arms by slot, this worker's slots, the arms that lie on several workers, what a
    micro-batch's mean loss is multiplied by: of the target, and by arm.
    """

    arms: list[int]
    mine: list[Slot]
    shared: list[int]
    scale: float
    weights: dict[int, float]


@dataclass(frozen=True, slots=True)
class MixRecord:
    """One step of all workers: losses are means over tokens of a micro-batch, then over these.

    `rewards`: of the arms of the step, not quantised; `complaints`: those that were not learnt, on
    the first worker. `data_wait_s`: of this worker.
    """

    step: int
    auxiliary_loss: float | None
    target_loss: float | None
    rewards: dict[int, float]
    grad_norm: float
    seconds: float
    data_wait_s: float
    complaints: Sequence[str] = ()


class MixTrainer:
    """Trains a model in place, a step at a time; each worker has one. For `fit`.

    A micro-batch is the same computation on any worker: its shape depends on its own rows, and
    dropout is seeded by (seed, step, slot). So runs of different numbers of workers differ by the
    order of float32 sums alone.

    Args:
        task: the run.
        model: float32 weights on `device`, the same on all workers.
        target: the training half of the shots.
        mixer: the first worker's deals the arms and learns their rewards.
        reference: DoReMi's, for rewards by excess loss.
    """

    def __init__(
        self,
        task: MixTask,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        arms: ArmReader,
        target: Sequence[TargetRow],
        collate: Collator,
        mixer: Mixer,
        *,
        device: torch.device,
        group: WorkerGroup | None = None,
        reference: PreTrainedModel | None = None,
    ) -> None:
        self.model, self._optimizer, self._arms = model, optimizer, arms
        self._target = [row.row for row in target]
        self.collate, self._plan, self._num_steps = collate, task.rule.plan, task.rule.num_steps
        self._settings = task.train.optimisation(task.seed)
        self._micro_batch = task.train.micro_batch
        self._mixer, self._device, self._reference = mixer, device, reference
        self._group = group or WorkerGroup()
        self._dtype = choose_dtype(task.train.dtype, device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._compared = list(compared_parameters(model, self._plan.parameters).values())
        self._capture = GradientCapture(self._compared)
        self._dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self.step_number = self.target_drawn = self.passes = 0
        self.drawn: Counter[int] = Counter()

    @property
    def target_pass_batches(self) -> int:
        """M: micro-batches that hold the target's training half once."""
        return -(-len(self._target) // self._micro_batch)

    def step(self) -> MixRecord:
        """One optimiser step on what the mixer deals; it learns the rewards.

        Raises:
            DivergedError: as `train_on`; or too many rewards are not finite.
        """
        first = self._group.rank == 0
        record = self.train_on(self._group.gather(self._mixer.deal() if first else None)[0])
        complaints = self._mixer.learn(record.rewards) if first else []
        return replace(record, complaints=complaints)

    def train_on(self, draw: Draw) -> MixRecord:
        """One optimiser step on the micro-batches of the drawn arms, the same on all workers; of
        none on the target alone.

        Raises:
            DivergedError: loss or gradient norm is NaN or infinite.
        """
        started, waited = perf_counter(), self._arms.wait_s
        rate = learning_rate(self.step_number, self._num_steps, self._settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        step = self._open(draw)
        self.model.train()
        losses, rewards, aim = self._passes(step)
        norm = self._update()
        rewards |= self._later_rewards(step, aim)
        self._close(step)
        rows, rewards = self._gather(losses, rewards)
        auxiliary, target = _mean(rows, of_target=False), _mean(rows, of_target=True)
        self._check([auxiliary, target], norm, rate)
        seconds, waited = perf_counter() - started, self._arms.wait_s - waited
        return MixRecord(self.step_number, auxiliary, target, rewards, norm, seconds, waited)

    def _open(self, draw: Draw) -> _Step:
        slots, size = slots_of(draw.arms, self.drawn), self._group.size
        mine = [slots[i] for i in share(len(slots), self._group.rank, size)]
        self._read_ahead(mine)
        scale = 1 / (len(slots) or self._plan.target_batches)
        weights = {a: scale * (draw.weights[a] if draw.weights else 1.0) for a in {*draw.arms}}
        return _Step(draw.arms, mine, spanning(slots, size), scale, weights)

    def _passes(self, step: _Step) -> tuple[list[_Sums], dict[int, float], Aim | None]:
        """Backward through the target and this worker's slots. With the target's gradient, an arm
        is rewarded as soon as it is done, so that one arm's gradient is held at a time.
        """
        plan = self._plan
        early = plan.by_gradient and plan.target_gradient == "before_step"
        losses = self._target_pass(plan.target_batches, step.scale, captured=early)
        aim = self._aim(plan.target_batches * step.scale) if early else None
        rewards: dict[int, float] = {}
        for arm, run in groupby(step.mine, key=lambda slot: slot.arm):
            losses += [self._arm_pass(slot, step.weights[arm]) for slot in run]
            if aim is not None and arm not in step.shared:
                rewards[arm] = self._reward(step, arm, aim)
        return losses, rewards, aim

    def _later_rewards(self, step: _Step, aim: Aim | None) -> dict[int, float]:
        """Of arms that lie on several workers, the only ones whose gradients travel; and of all, as
        published, against the target's gradient at the new weights, by a second pass.
        """
        if not self._plan.by_gradient:
            return {}
        arms = step.shared
        if aim is None:
            arms = [*sorted({slot.arm for slot in step.mine} - {*arms}), *arms]
            with self._compared_only():
                self._target_pass(self._plan.target_batches, step.scale, captured=True)
            self._optimizer.zero_grad(set_to_none=True)
            aim = self._aim(self._plan.target_batches * step.scale)
        return {arm: self._reward(step, arm, aim) for arm in arms}

    def _close(self, step: _Step) -> None:
        self.drawn.update(step.arms)
        self._read_ahead([Slot(arm, 0, self.drawn[arm]) for arm in {s.arm for s in step.mine}])
        self.step_number += 1
        self.passes += self._plan.passes(len(step.arms))

    def initial_rewards(self, num_examples: int) -> list[float]:
        """A first reward of each arm at the present weights, from at most so many of its rows.

        Only the compared parameters get gradients, so the backward passes are short.
        """
        size = self._micro_batch
        counts = [min(num_examples, part.num_rows) for part in self._arms.parts]
        batches = [-(-count // size) for count in counts]
        name: Any = self._plan.reward if self._plan.by_gradient else "alignment"
        rewards: dict[int, float] = {}
        before, self.target_drawn = self.target_drawn, 0
        with self._compared_only():
            self.model.train()
            self._target_pass(self.target_pass_batches, 1.0, captured=True)
            aim = self._aim(self.target_pass_batches)
            for arm in share(len(counts), self._group.rank, self._group.size):
                for i in range(batches[arm]):
                    rows = self._arms.rows(arm, i * size, min(size, counts[arm] - i * size))
                    with self._capture.arm(arm), self._seeded(i):
                        self._backward(rows, 1.0)
                rewards[arm] = aim.reward(self._mean_gradient(arm, batches[arm]), name)
        self._optimizer.zero_grad(set_to_none=True)
        self.target_drawn = before
        self.passes += sum(batches) + self.target_pass_batches
        found = {arm: r for part in self._group.gather(rewards) for arm, r in part.items()}
        return [found[arm] for arm in range(len(counts))]

    def snapshot(self) -> Snapshot:
        """Weights, moments, places in all streams, and the mixer, whose log is written."""
        first = self._group.rank == 0
        progress = {
            "step": self.step_number,
            "target_drawn": self.target_drawn,
            "passes": self.passes,
            "drawn": sorted(self.drawn.items()),
            "mixer": self._mixer.checkpoint() if first else None,
        }
        return take_snapshot(self.model, self._optimizer, progress, keep=first)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same run, with any number of workers."""
        put_snapshot(snapshot, self.model, self._optimizer)
        progress = snapshot.progress
        self.step_number, self.passes = progress["step"], progress["passes"]
        self.target_drawn = progress["target_drawn"]
        self.drawn = Counter({int(arm): int(count) for arm, count in progress["drawn"]})
        if self._group.rank == 0:
            self._mixer.resume(progress["mixer"])

    def close(self) -> None:
        """Remove the hooks."""
        self._capture.close()

    def _read_ahead(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._arms.ahead(slot.arm, slot.batch * self._micro_batch, self._micro_batch)

    def _target_pass(self, count: int, weight: float, *, captured: bool) -> list[_Sums]:
        """Backward through this worker's of the target's next `count` micro-batches; `captured`
        keeps the compared parameters' gradient, to compare arms with.
        """
        losses: list[_Sums] = []
        for i in share(count, self._group.rank, self._group.size):
            rows = self._target_rows(self.target_drawn + i)
            keep = self._capture.arm(TARGET) if captured else nullcontext()
            with keep, self._seeded(-1 - i):
                losses.append((TARGET, i, self._backward(rows, weight)))
        self.target_drawn += count
        return losses

    def _target_rows(self, batch: int) -> list[Row]:
        """Micro-batch `batch` of the target's endless stream, shuffled anew in every pass."""
        epoch, place = divmod(batch, self.target_pass_batches)
        rng = np.random.default_rng([self._settings.seed, 2, epoch])
        order = rng.permutation(len(self._target))
        rows = order[place * self._micro_batch : (place + 1) * self._micro_batch]
        return [self._target[i] for i in rows]

    def _arm_pass(self, slot: Slot, weight: float) -> _Sums:
        """Backward through a slot's micro-batch."""
        rows = self._arms.rows(slot.arm, slot.batch * self._micro_batch, self._micro_batch)
        keep = self._capture.arm(slot.arm) if self._plan.by_gradient else nullcontext()
        with keep, self._seeded(slot.number):
            return slot.arm, slot.number, self._backward(rows, weight)

    def _backward(self, rows: Sequence[Row], weight: float) -> Tensor:
        """Backward of the micro-batch's mean loss times `weight`. NLL, tokens and excess: [3]."""
        batch = self.collate(rows).to(self._device)
        excess = torch.zeros((), device=self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            nll, mask = token_losses(self.model, batch)
            if self._plan.reward == "excess" and self._reference is not None:
                with torch.no_grad():
                    excess = clipped_excess(nll, token_losses(self._reference, batch)[0])
        total, tokens = nll.sum(1).sum(), mask.sum()
        (total / tokens * weight).backward()
        return torch.stack([total.detach(), tokens.float(), excess])

    def _aim(self, parts: float) -> Aim:
        return Aim(self._mean_gradient(TARGET, parts, together=True))

    def _reward(self, step: _Step, arm: int, aim: Aim) -> float:
        name: Any = self._plan.reward
        parts = step.arms.count(arm) * step.weights[arm]
        return aim.reward(self._mean_gradient(arm, parts, together=arm in step.shared), name)

    def _mean_gradient(self, arm: int, parts: float, *, together: bool = False) -> Tensor:
        """The arm's (or the target's) gradients over `parts`: float32[P]; `together` those of all
        workers, which have to ask for it together.
        """
        total = self._capture.take(arm)
        total = self._group.total(total) if together else total
        return total if parts == 1 else total.div_(parts)

    def _update(self) -> float:
        """Sum of gradients over workers, clipped; the optimiser's step. Returns their norm."""
        if self._group.size > 1:
            for parameter in self._parameters:  # a worker may have had no micro-batch
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._group.sum_gradients(self._parameters)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _gather(
        self, losses: Sequence[_Sums], rewards: dict[int, float]
    ) -> tuple[list[BatchLoss], dict[int, float]]:
        """Losses and rewards of all workers, the same on each."""
        sums = torch.stack([of for _, _, of in losses]).tolist() if losses else []
        mine = [BatchLoss(a, n, *of) for (a, n, _), of in zip(losses, sums, strict=True)]
        gathered = self._group.gather((mine, rewards))
        rows = sorted(row for part, _ in gathered for row in part)
        if self._plan.reward in ("loss", "excess"):
            return rows, loss_rewards(rows, self._plan.reward)
        return rows, {arm: r for _, part in gathered for arm, r in sorted(part.items())}

    def _check(self, losses: Sequence[float | None], norm: float, rate: float) -> None:
        if math.isfinite(norm) and all(x is None or math.isfinite(x) for x in losses):
            return
        raise DivergedError(
            f"step {self.step_number}: losses of arms and target {losses}, gradient norm {norm} "
            f"at learning rate {rate:.3g}: lower `train.learning_rate`"
        )

    @contextmanager
    def _seeded(self, number: int) -> Generator[None]:
        """Dropout of this micro-batch, whichever worker has it."""
        if not self._dropout:
            yield
            return
        key = fingerprint(["dropout", self._settings.seed, self.step_number, number])
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(key[:15], 16))
            yield

    @contextmanager
    def _compared_only(self) -> Generator[None]:
        """Gradients of the compared parameters alone."""
        others = {*self._parameters} - {*self._compared}
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def _mean(rows: Sequence[BatchLoss], *, of_target: bool) -> float | None:
    means = [row.nll / row.tokens for row in rows if (row.arm == TARGET) == of_target]
    return fmean(means) if means else None
