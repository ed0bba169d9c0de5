"""One optimiser step of mixing: micro-batches of the drawn arms, the target, the arms' rewards.

    1. target pass (where the policy has one): all M micro-batches of the target's training half
    2. the step's auxiliary micro-batches, each loss divided by their number G
    3. gradients summed over workers, clipped, optimiser step
    4. rewards: gradient of each arm against the target's, on the named parameters

With `before_step` the target's gradient is that of 1: it is taken at the same weights as the arms'
gradients and costs nothing. `after_step`, as published, is a second pass at the new weights. Both
sides of a reward are means over micro-batches.
"""

import math
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import DivergedError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmReader, Row
from stillhouse.mixing.batches import (
    Collator,
    Evaluation,
    Slot,
    choose_shots,
    evaluate,
    share,
    shared_arms,
    slots_of,
    token_losses,
)
from stillhouse.mixing.mixer import Draw, Mixer
from stillhouse.mixing.rewards import (
    TARGET,
    BatchLoss,
    GradientCapture,
    TargetGradient,
    compared_parameters,
    loss_rewards,
)
from stillhouse.mixing.spec import MixTask
from stillhouse.models.causal_lm import choose_dtype
from stillhouse.models.text_to_text import build_text_model, load_text_model
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import PAD_TOKEN, load_tokenizer
from stillhouse.training.checkpoint import Snapshot, put_snapshot, take_snapshot
from stillhouse.training.group import WorkerGroup
from stillhouse.training.optimisation import learning_rate, make_adafactor, make_optimizer

_Sums: TypeAlias = tuple[int, int, Tensor]
"""Of one micro-batch: arm, number, and float32 [3]: NLL, tokens, excess."""


@dataclass(frozen=True, slots=True)
class MixRecord:
    """One step of all workers; losses are means over a micro-batch's tokens, then over these.

    Attributes:
        rewards: by arm of the step, before rounding.
        data_wait_s: seconds that this worker waited for rows.
        complaints: rewards that were not finite; on the first worker.
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
    """Trains the model of a run, one step at a time, for `fit`; each worker has one.

    A micro-batch is the same computation on any worker: its shape depends on its own rows, and
    dropout is seeded by (seed, step, slot). So runs with different numbers of workers differ only
    in the order of float32 sums. Only the first worker's mixer is called.
    """

    def __init__(
        self,
        store: Store,
        task: MixTask,
        mixer: Mixer,
        *,
        device: torch.device,
        group: WorkerGroup | None = None,
    ) -> None:
        tokenizer = load_tokenizer(task.tokenizer, task.eos_token)
        ids = map(tokenizer.backend.token_to_id, (PAD_TOKEN, "<pad>"))  # masked: any id will do
        pad_id = next((i for i in ids if i is not None), tokenizer.eos_id)
        self.collate = Collator(task.encoder_decoder, tokenizer.eos_id, pad_id, task.bos_id)
        self.arms = ArmReader(store, task.arms, seed=task.seed)
        self.shots = choose_shots(
            read_table(store.path(task.target)), num_shots=task.num_shots, seed=task.seed
        )
        self.model = _start_model(task, tokenizer.vocab_size, self.collate, device)
        self.reference = None
        if task.reference is not None:
            self.reference = _load(task, task.reference.folder, device)
            self.reference.eval().requires_grad_(False)
        self._settings = task.train.optimisation(task.seed)
        make = make_optimizer if task.train.optimizer == "adamw" else make_adafactor
        self.optimizer = make(self.model, self._settings)
        self._task, self._mixer, self._device = task, mixer, device
        self._plan, self._micro_batch = task.rule.plan, task.train.micro_batch
        self._group = group or WorkerGroup()
        self._dtype = choose_dtype(task.train.dtype, device)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._compared = list(compared_parameters(self.model, self._plan.parameters).values())
        self._capture = GradientCapture(self._compared)
        self._inputs: Sequence[nn.Parameter] | None = None
        self._dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
        self.step_number = self.target_drawn = self.passes = 0
        self.drawn: Counter[int] = Counter()

    @property
    def _num_target_batches(self) -> int:
        return -(-len(self.shots.train) // self._micro_batch)

    def begin(self) -> None:
        """Start the mixer, with the initial rewards where its policy needs them."""
        examples = self._task.rule.policy.first_examples
        rewards = self.initial_rewards(examples) if examples else []
        if self._group.rank == 0:
            self._mixer.begin(rewards)

    def step(self) -> MixRecord:
        """One optimiser step on what the mixer draws; the mixer learns the rewards."""
        first = self._group.rank == 0
        record = self.train_on(self._group.gather(self._mixer.draw() if first else None)[0])
        complaints = self._mixer.learn(record.rewards) if first else []
        return replace(record, complaints=complaints)

    def train_on(self, draw: Draw) -> MixRecord:
        """One optimiser step on the drawn arms, the same on all workers; without arms, on the
        target alone.

        Raises:
            DivergedError: loss or gradient norm is not finite.
        """
        started, waited = perf_counter(), self.arms.wait_s
        rate = learning_rate(self.step_number, self._task.rule.num_steps, self._settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses, rewards, norm = self._optimise(draw)
        rows, rewards = self._gather(losses, rewards)
        auxiliary, target = _mean_loss(rows, of_target=False), _mean_loss(rows, of_target=True)
        if not all(value is None or math.isfinite(value) for value in (auxiliary, target, norm)):
            raise DivergedError(
                f"step {self.step_number}: losses of arms and target {[auxiliary, target]}, "
                f"gradient norm {norm} at learning rate {rate:.3g}: lower `train.learning_rate`"
            )
        seconds, waited = perf_counter() - started, self.arms.wait_s - waited
        return MixRecord(self.step_number, auxiliary, target, rewards, norm, seconds, waited)

    def _optimise(self, draw: Draw) -> tuple[list[_Sums], dict[int, float], float]:
        """This worker's losses and rewards, and the gradient norm.

        An arm whose target gradient is known and which no other worker has is rewarded as soon as
        its slots are done, so that only one arm's gradient is kept at a time.
        """
        plan, group = self._plan, self._group
        slots = slots_of(draw.arms, self.drawn)
        mine = [slots[i] for i in share(len(slots), group.rank, group.size)]
        self._read_ahead(mine)
        shared = shared_arms(slots, group.size)
        scale = 1 / (len(slots) or plan.target_batches)
        weights = {a: scale * (draw.weights[a] if draw.weights else 1.0) for a in {*draw.arms}}
        target_weight = plan.target_batches * scale

        def reward(arm: int, target: TargetGradient) -> float:
            name: Any = plan.reward
            total = draw.arms.count(arm) * weights[arm]
            return target.reward(self._mean_gradient(arm, total, summed=arm in shared), name)

        early = plan.by_gradient and plan.target_gradient == "before_step"
        self.model.train()
        losses = self._target_pass(plan.target_batches, scale, captured=early)
        target = self._target_gradient(target_weight) if early else None
        rewards: dict[int, float] = {}
        for arm, run in groupby(mine, key=lambda slot: slot.arm):
            for slot in run:
                rows = self.arms.rows(arm, slot.batch * self._micro_batch, self._micro_batch)
                captured = plan.by_gradient
                losses.append(self._pass(arm, slot.number, rows, weights[arm], captured=captured))
            if target is not None and arm not in shared:
                rewards[arm] = reward(arm, target)
        norm = self._update()
        if plan.by_gradient and not early:
            with self._compared_only():
                self._target_pass(plan.target_batches, scale, captured=True)
            target = self._target_gradient(target_weight)
            own = sorted({slot.arm for slot in mine} - {*shared})
            rewards = {arm: reward(arm, target) for arm in own}
        if target is not None:
            rewards |= {arm: reward(arm, target) for arm in shared}
        self.drawn.update(draw.arms)
        self._read_ahead([Slot(arm, 0, self.drawn[arm]) for arm in {s.arm for s in mine}])
        self.step_number += 1
        self.passes += plan.passes(len(draw.arms))
        return losses, rewards, norm

    def initial_rewards(self, num_examples: int) -> list[float]:
        """Each arm's reward before the first step, from at most `num_examples` of its rows.

        Only the compared parameters get gradients, so the backward passes are short.
        """
        size = self._micro_batch
        counts = [min(num_examples, part.num_rows) for part in self.arms.parts]
        batches = [-(-count // size) for count in counts]
        name: Any = self._plan.reward if self._plan.by_gradient else "alignment"
        rewards: dict[int, float] = {}
        self.model.train()
        with self._compared_only():
            self._target_pass(self._num_target_batches, 1.0, captured=True)
            target = self._target_gradient(self._num_target_batches)
            for arm in share(len(counts), self._group.rank, self._group.size):
                for i in range(batches[arm]):
                    rows = self.arms.rows(arm, i * size, min(size, counts[arm] - i * size))
                    self._pass(arm, i, rows, 1.0, captured=True)
                rewards[arm] = target.reward(self._mean_gradient(arm, batches[arm]), name)
        self.target_drawn = 0
        self.passes += sum(batches) + self._num_target_batches
        by_arm = {arm: r for part in self._group.gather(rewards) for arm, r in part.items()}
        return [by_arm[arm] for arm in range(len(counts))]

    def evaluate(self, rows: Sequence[Row]) -> Evaluation:
        return evaluate(self.model, self.collate, rows, device=self._device, group=self._group)

    def snapshot(self) -> Snapshot:
        """Weights, moments, positions in all streams, and the mixer, whose log is written."""
        first = self._group.rank == 0
        progress = {
            "step": self.step_number,
            "target_drawn": self.target_drawn,
            "passes": self.passes,
            "drawn": sorted(self.drawn.items()),
            "mixer": self._mixer.checkpoint() if first else None,
        }
        parameters = dict(self.model.named_parameters())
        return take_snapshot(parameters, self.optimizer, progress, keep=first)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore a snapshot of the same run, with any number of workers."""
        put_snapshot(snapshot, dict(self.model.named_parameters()), self.optimizer)
        progress = snapshot.progress
        self.step_number, self.passes = progress["step"], progress["passes"]
        self.target_drawn = progress["target_drawn"]
        self.drawn = Counter({int(arm): int(count) for arm, count in progress["drawn"]})
        if self._group.rank == 0:
            self._mixer.resume(progress["mixer"])

    def _read_ahead(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self.arms.ahead(slot.arm, slot.batch * self._micro_batch, self._micro_batch)

    def _target_pass(self, count: int, weight: float, *, captured: bool) -> list[_Sums]:
        """Backward through this worker's share of the target's next `count` micro-batches."""
        mine = share(count, self._group.rank, self._group.size)
        batches = [(i, self._target_batch(self.target_drawn + i)) for i in mine]
        self.target_drawn += count
        return [self._pass(TARGET, i, rows, weight, captured=captured) for i, rows in batches]

    def _target_batch(self, batch: int) -> list[Row]:
        """Micro-batch `batch` of the target's endless stream, reshuffled in every pass."""
        epoch, place = divmod(batch, self._num_target_batches)
        rng = np.random.default_rng([self._settings.seed, 2, epoch])
        order = rng.permutation(len(self.shots.train))
        rows = order[place * self._micro_batch : (place + 1) * self._micro_batch]
        return [self.shots.train[i] for i in rows]

    def _pass(
        self, arm: int, number: int, rows: Sequence[Row], weight: float, *, captured: bool
    ) -> _Sums:
        """Backward of a micro-batch's mean loss times `weight`; `captured` keeps the gradient of
        the compared parameters.
        """
        batch = self.collate(rows, self._device)
        excess = torch.zeros((), device=self._device)
        capture = self._capture.arm(arm) if captured else nullcontext()
        cast = torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
        with capture, self._seeded(-1 - number if arm == TARGET else number):
            with cast:
                nll, mask = token_losses(self.model, batch)
                if self._plan.reward == "excess" and self.reference is not None:
                    with torch.no_grad():
                        excess = (nll - token_losses(self.reference, batch)[0]).clamp(min=0).sum()
            total, tokens = nll.sum(1).sum(), mask.sum()
            (total / tokens * weight).backward(inputs=self._inputs)
        return arm, number, torch.stack([total.detach(), tokens.float(), excess])

    def _target_gradient(self, total: float) -> TargetGradient:
        return TargetGradient(self._mean_gradient(TARGET, total, summed=True))

    def _mean_gradient(self, arm: int, weight: float, *, summed: bool = False) -> Tensor:
        """The captured gradients of an arm or the target over their total weight: float32[P];
        `summed` over all workers, in a collective call.
        """
        total = self._capture.take(arm)
        total = self._group.total(total) if summed else total
        return total if weight == 1 else total.div_(weight)

    def _update(self) -> float:
        """Sum the gradients over workers, clip, step the optimiser. Returns their norm."""
        if self._group.size > 1:
            for parameter in self._parameters:  # a worker may have had no micro-batch
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._group.sum_gradients(self._parameters)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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

    @contextmanager
    def _seeded(self, number: int) -> Generator[None]:
        """Seed dropout by the micro-batch, whichever worker has it."""
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
        """Backward passes inside reach the compared parameters alone, and leave no gradient."""
        self._inputs = self._compared
        yield
        self._inputs = None
        self.optimizer.zero_grad(set_to_none=True)


def _start_model(
    task: MixTask, vocab_size: int, collate: Collator, device: torch.device
) -> PreTrainedModel:
    """The model that a run begins with, on its device."""
    if task.init is not None:
        model = _load(task, task.init.folder, device)
    else:
        model = build_text_model(
            task.model,
            encoder_decoder=task.encoder_decoder,
            vocab_size=vocab_size,
            num_positions=task.max_input + task.max_target + 1 + int(task.bos_id is not None),
            seed=task.seed,
            eos_id=collate.eos_id,
            pad_id=collate.pad_id,
        )
        model.to(device)  # pyright: ignore[reportArgumentType]
    if task.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _load(task: MixTask, folder: str, device: torch.device) -> PreTrainedModel:
    return load_text_model(folder, encoder_decoder=task.encoder_decoder, device=device)


def _mean_loss(rows: Sequence[BatchLoss], *, of_target: bool) -> float | None:
    means = [row.nll / row.tokens for row in rows if (row.arm == TARGET) == of_target]
    return fmean(means) if means else None
