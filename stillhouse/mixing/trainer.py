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
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import DivergedError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmReader, Row
from stillhouse.mixing.collation import Collator, TaskBatch
from stillhouse.mixing.dealing import Slot, share, slots_of, spanning
from stillhouse.mixing.gradients import GradientCapture, named_parameters, output_head
from stillhouse.mixing.open_step import TARGET, BatchLoss, OpenStep, StepOutcome, collect
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.rewards import Aim
from stillhouse.mixing.target import TargetRow
from stillhouse.mixing.task_loss import clipped_excess, row_losses, token_losses
from stillhouse.models.causal_lm import choose_dtype
from stillhouse.spec import Optimisation
from stillhouse.training.group import WorkerGroup
from stillhouse.training.optimisation import learning_rate
from stillhouse.training.state import Snapshot, put_snapshot, take_snapshot


@dataclass(frozen=True, slots=True)
class MixRecord:
    """One step of all workers: losses are means over tokens of a micro-batch, then over these.

    `rewards`: of the arms of the step, not quantised. `data_wait_s`: of this worker.
    """

    step: int
    auxiliary_loss: float | None
    target_loss: float | None
    rewards: dict[int, float]
    grad_norm: float
    learning_rate: float
    seconds: float
    data_wait_s: float


class MixTrainer:
    """Trains a model in place, a step at a time; each worker has one.

    A micro-batch is the same computation on any worker: its shape depends on its own rows, and
    dropout is seeded by (seed, step, slot). So runs of different numbers of workers differ by the
    order of float32 sums alone.

    Args:
        model: float32 weights on `device`, the same on all workers.
        target: the training half of the shots.
        num_steps: of the whole run, for the learning rate.
        reference: DoReMi's, for rewards by excess loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        arms: ArmReader,
        target: Sequence[TargetRow],
        collate: Collator,
        plan: StepPlan,
        settings: Optimisation,
        *,
        device: torch.device,
        num_steps: int,
        group: WorkerGroup | None = None,
        reference: PreTrainedModel | None = None,
    ) -> None:
        self.model, self._optimizer, self._arms = model, optimizer, arms
        self._target = [row.row for row in target]
        self._collate, self._plan, self._settings = collate, plan, settings
        self._device, self._num_steps = device, num_steps
        self._group, self._reference = group or WorkerGroup(), reference
        self._micro_batch = settings.micro_batch or 8
        self._dtype = choose_dtype(settings.dtype, device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._subset = list(compared_parameters(model, plan.parameters).values())
        self._capture = GradientCapture(compared_parameters(model, plan.parameters))
        self._dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        self.step_number = self.target_drawn = self.passes = 0
        self.drawn: Counter[int] = Counter()

    @property
    def target_pass_batches(self) -> int:
        """M: micro-batches that hold the target's training half once."""
        return -(-len(self._target) // self._micro_batch)

    def step(self, arms: Sequence[int], weights: Sequence[float] | None = None) -> MixRecord:
        """One optimiser step on the micro-batches of these arms.

        Args:
            arms: by slot, the same on all workers; none for the target alone.
            weights: what each arm's loss is multiplied by; default 1.

        Raises:
            DivergedError: loss or gradient norm is NaN or infinite.
        """
        started, waited = perf_counter(), self._arms.wait_s
        rate = learning_rate(self.step_number, self._num_steps, self._settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        step = self._begin(arms, weights)
        self.model.train()
        early = self._plan.by_gradient and self._plan.target_gradient == "before_step"
        target = self._target_pass(step, self._plan.target_batches, captured=early)
        aim = self._aim(step) if early else None
        losses, rewards = self._auxiliary(step, aim)
        norm = self._update()
        if self._plan.by_gradient and not early:
            rewards = self._rewards_after(step)
        self._end(step, arms)
        found = self._gather([*target, *losses], rewards)
        self._check(found, norm, rate)
        return MixRecord(
            step=self.step_number,
            auxiliary_loss=found.auxiliary,
            target_loss=found.target,
            rewards=found.rewards,
            grad_norm=norm,
            learning_rate=rate,
            seconds=perf_counter() - started,
            data_wait_s=self._arms.wait_s - waited,
        )

    def initial_rewards(self, num_examples: int) -> list[float]:
        """A first reward of each arm at the present weights, from at most so many of its rows.

        Only the compared parameters get gradients, so the backward passes are short.
        """
        sizes = [min(num_examples, rows) for rows in self._arms.num_rows]
        batches = [-(-size // self._micro_batch) for size in sizes]
        rewards: dict[int, float] = {}
        name: Any = self._plan.reward if self._plan.by_gradient else "alignment"
        before, self.target_drawn = self.target_drawn, 0
        with self._subset_only():
            self.model.train()
            pass_ = OpenStep([], [], [], 1.0, None)
            self._target_pass(pass_, self.target_pass_batches, captured=True)
            aim = Aim.of(self._take(TARGET, together=True) / self.target_pass_batches)
            for arm in share(len(sizes), self._group.rank, self._group.size):
                for i in range(batches[arm]):
                    first = i * self._micro_batch
                    rows = self._arms.rows(arm, first, min(self._micro_batch, sizes[arm] - first))
                    with self._capture.arm(arm), self._seeded(i):
                        self._backward(rows, 1.0)
                mean = self._take(arm, together=False) / batches[arm]
                rewards[arm] = aim.products(mean).reward(name)
        self._optimizer.zero_grad(set_to_none=True)
        self.target_drawn = before
        self.passes += sum(batches) + self.target_pass_batches
        found = {arm: r for part in self._group.gather(rewards) for arm, r in part.items()}
        return [found[arm] for arm in range(len(sizes))]

    def snapshot(self, extra: dict[str, Any]) -> Snapshot:
        """Weights, moments and places in all streams, with `extra` JSON values."""
        progress = {
            "step": self.step_number,
            "target_drawn": self.target_drawn,
            "passes": self.passes,
            "drawn": sorted(self.drawn.items()),
            "extra": extra,
        }
        keep = self._group.rank == 0
        return take_snapshot(self.model, self._optimizer, progress, keep=keep)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of the same run, with any number of workers."""
        put_snapshot(snapshot, self.model, self._optimizer)
        progress = snapshot.progress
        self.step_number, self.passes = progress["step"], progress["passes"]
        self.target_drawn = progress["target_drawn"]
        self.drawn = Counter({int(arm): int(count) for arm, count in progress["drawn"]})

    def close(self) -> None:
        """Remove the hooks."""
        self._capture.close()

    def _begin(self, arms: Sequence[int], weights: Sequence[float] | None) -> OpenStep:
        slots = slots_of(arms, self.drawn)
        mine = [slots[i] for i in share(len(slots), self._group.rank, self._group.size)]
        self._read_ahead(mine)
        scale = 1 / (len(arms) or self._plan.target_batches)
        return OpenStep(slots, mine, spanning(slots, self._group.size), scale, weights)

    def _end(self, step: OpenStep, arms: Sequence[int]) -> None:
        self.drawn.update(arms)
        self._read_ahead([Slot(0, arm, self.drawn[arm]) for arm in {s.arm for s in step.mine}])
        self.step_number += 1
        self.passes += self._plan.passes(len(arms))

    def _read_ahead(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._arms.ahead(slot.arm, slot.batch * self._micro_batch, self._micro_batch)

    def _target_pass(self, step: OpenStep, count: int, *, captured: bool) -> list[BatchLoss]:
        """Backward through the target's next micro-batches, those that are this worker's.

        Args:
            step: the open one.
            count: micro-batches of all workers.
            captured: keep the compared parameters' gradient, to compare arms with.
        """
        losses: list[BatchLoss] = []
        for i in share(count, self._group.rank, self._group.size):
            rows = self._target_rows(self.target_drawn + i)
            keep = self._capture.arm(TARGET) if captured else nullcontext()
            with keep, self._seeded(-1 - i):
                losses.append(BatchLoss(i, TARGET, self._backward(rows, step.scale)))
        self.target_drawn += count
        return losses

    def _target_rows(self, batch: int) -> list[Row]:
        """Micro-batch `batch` of the target's endless stream, shuffled anew in every pass."""
        epoch, place = divmod(batch, self.target_pass_batches)
        rng = np.random.default_rng([self._settings.seed, 2, epoch])
        order = rng.permutation(len(self._target))
        rows = order[place * self._micro_batch : (place + 1) * self._micro_batch]
        return [self._target[i] for i in rows]

    def _auxiliary(
        self, step: OpenStep, aim: Aim | None
    ) -> tuple[list[BatchLoss], dict[int, float]]:
        """Backward through this worker's slots. With the target's gradient, an arm is rewarded as
        soon as it is done, so that one arm's gradient is held at a time.
        """
        losses: list[BatchLoss] = []
        rewards: dict[int, float] = {}
        for i, slot in enumerate(step.mine):
            size = self._micro_batch
            rows = self._arms.rows(slot.arm, slot.batch * size, size)
            keep = self._capture.arm(slot.arm) if self._plan.by_gradient else nullcontext()
            with keep, self._seeded(slot.number):
                sums = self._backward(rows, step.weight(slot.arm))
            losses.append(BatchLoss(slot.number, slot.arm, sums))
            done = i + 1 == len(step.mine) or step.mine[i + 1].arm != slot.arm
            if done and aim is not None and slot.arm not in step.shared:
                rewards[slot.arm] = self._reward(step, slot.arm, aim, together=False)
        if aim is not None:
            rewards |= self._shared_rewards(step, aim)
        return losses, rewards

    def _shared_rewards(self, step: OpenStep, aim: Aim) -> dict[int, float]:
        """Of arms that lie on several workers: the only arms whose gradients travel."""
        return {arm: self._reward(step, arm, aim, together=True) for arm in step.shared}

    def _rewards_after(self, step: OpenStep) -> dict[int, float]:
        """As published: against the target's gradient at the new weights, by a second pass."""
        with self._subset_only():
            self._target_pass(step, self._plan.target_batches, captured=True)
        self._optimizer.zero_grad(set_to_none=True)
        aim = self._aim(step)
        mine = sorted({slot.arm for slot in step.mine} - {*step.shared})
        rewards = {arm: self._reward(step, arm, aim, together=False) for arm in mine}
        return rewards | self._shared_rewards(step, aim)

    def _aim(self, step: OpenStep) -> Aim:
        return Aim.of(self._mean_gradient(step, TARGET, together=True))

    def _reward(self, step: OpenStep, arm: int, aim: Aim, *, together: bool) -> float:
        name: Any = self._plan.reward
        return aim.products(self._mean_gradient(step, arm, together=together)).reward(name)

    def _mean_gradient(self, step: OpenStep, arm: int, *, together: bool) -> Tensor:
        """Mean over the arm's (or the target's) micro-batches: float32[P]. Forgets the sum."""
        batches = self._plan.target_batches if arm == TARGET else step.batches(arm)
        total, parts = self._take(arm, together=together), batches * step.weight(arm)
        return total if parts == 1 else total.div_(parts)

    def _take(self, arm: int, *, together: bool) -> Tensor:
        total = self._capture.total(arm)
        self._capture.drop(arm)
        return self._group.total(total) if together else total

    def _backward(self, rows: Sequence[Row], weight: float) -> Tensor:
        """Backward of the micro-batch's mean loss times `weight`; its `BatchLoss.sums`."""
        batch = self._collate(rows).to(self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            if self._plan.reward == "excess" and self._reference is not None:
                return self._backward_excess(batch, weight)
            losses = row_losses(self.model, batch)
        (losses.mean() * weight).backward()
        sums = torch.stack([losses.nll.detach().sum(), losses.tokens.sum().float()])
        return torch.cat([sums, torch.zeros_like(sums)])

    def _backward_excess(self, batch: TaskBatch, weight: float) -> Tensor:
        """The same, with the loss over the reference's, clipped at each token (DoReMi)."""
        assert self._reference is not None
        nll, mask = token_losses(self.model, batch)
        with torch.no_grad():
            reference, _ = token_losses(self._reference, batch)
        (nll.sum() / mask.sum() * weight).backward()
        excess = clipped_excess(nll.detach(), reference)
        tokens = mask.sum().float()
        return torch.stack([nll.detach().sum(), tokens, excess, tokens])

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

    def _gather(self, losses: Sequence[BatchLoss], rewards: dict[int, float]) -> StepOutcome:
        """Losses and rewards of all workers, the same on each."""
        sums = torch.stack([loss.sums for loss in losses]).tolist() if losses else []
        mine = [(of.arm, of.number, *row) for of, row in zip(losses, sums, strict=True)]
        gathered = self._group.gather((mine, rewards))
        rows = sorted(row for part, _ in gathered for row in part)
        merged = {arm: reward for _, part in gathered for arm, reward in sorted(part.items())}
        return collect(rows, self._plan.reward, merged)

    def _check(self, found: StepOutcome, norm: float, rate: float) -> None:
        losses = [found.auxiliary, found.target]
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
    def _subset_only(self) -> Generator[None]:
        """Gradients of the compared parameters alone."""
        others = {*self._parameters} - {*self._subset}
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)


def compared_parameters(model: PreTrainedModel, part: str) -> dict[str, nn.Parameter]:
    """The parameters whose gradients rewards compare: `output_head`, or by a part of their names.

    Raises:
        ModelError: no name contains `part`.
    """
    return output_head(model) if part == "output_head" else named_parameters(model, part)
