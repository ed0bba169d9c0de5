"""A trajectory-matching distillation in the store, by one worker or several, resumable.

Every `interval` iterations the set is stored as a part with a receipt (iteration 0: the real images
that it starts from), followed by a checkpoint of the whole state. Workers that are started again
resume from the newest checkpoint and end in the same bytes (on CPUs).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from stillhouse.distillation.adjoint import FlatModule, Gradients
from stillhouse.distillation.evaluate import BATCH
from stillhouse.distillation.experts import open_trajectories
from stillhouse.distillation.matching import (
    SyntheticSet,
    TrajectoryMethod,
    draw_batches,
    matching_gradients,
)
from stillhouse.distillation.prepared import ImageHost, ImageTask, Prepared
from stillhouse.distillation.real_images import choose_right, random_real, representative
from stillhouse.distillation.recipes import Group
from stillhouse.distillation.stored_sets import LabelledSet, rounded_set, set_table
from stillhouse.errors import DivergedError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.device import peak_bytes, reset_peak
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.storage.task import Place
from stillhouse.training.checkpoint import WEIGHT, Checkpoints, Snapshot, fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.task import Tell

_OUTER_MOMENTUM = 0.5
_LABEL_MOMENTUM = 0.9
Snapshots = Callable[[int], Tensor]
"""An expert: its parameters [P] after so many epochs, on the device of the images."""


@dataclass(frozen=True, slots=True)
class OuterStep:
    """An iteration, its loss, and whether the update was skipped."""

    step: int
    loss: float
    skipped: bool


class Matcher:
    """Learns a synthetic set; all progress is in its snapshot.

    Args:
        network: the student, on the device of the set.
        first: the set to start from. Float labels are learned as well.
        method: the method.
        experts: segments are drawn from these.
        num_epochs: of each expert.
        groups: of DSA.
        group: workers with the same set and draws; each computes its part of every batch.
    """

    def __init__(
        self,
        network: FlatModule,
        first: SyntheticSet,
        method: TrajectoryMethod,
        experts: Sequence[Snapshots],
        num_epochs: int,
        groups: Sequence[Group] = (),
        group: WorkerGroup | None = None,
    ) -> None:
        self._network, self._method, self._experts = network, method, experts
        self._num_epochs, self._groups = num_epochs, groups
        self._group = group or WorkerGroup()
        self._generator = torch.Generator().manual_seed(method.seed)
        self._expert_draws = torch.Generator().manual_seed(method.seed + 1)
        self.iteration, self.seconds = 0, 0.0
        self._learned = {"images": first.images, "learning_rate": first.learning_rate}
        self._hard_labels = first.labels
        if first.soft:
            self._learned["labels"] = first.labels
        self._velocity = {name: torch.zeros_like(v) for name, v in self._learned.items()}
        self._average = first.images

    @property
    def synthetic(self) -> SyntheticSet:
        """The current set."""
        labels = self._learned.get("labels", self._hard_labels)
        return SyntheticSet(self._learned["images"], labels, self._learned["learning_rate"])

    @property
    def averaged(self) -> SyntheticSet:
        """The current set, with the running average of the images if the method keeps one."""
        now = self.synthetic
        images = now.images if self._method.image_decay is None else self._average
        return SyntheticSet(images, now.labels, now.learning_rate)

    def stored(self, classes: Tensor, num_classes: int) -> LabelledSet:
        """The current set as it is stored; its images began as `classes`."""
        now, method = self.averaged, self._method
        rate, levels = float(now.learning_rate), method.stored_as == "uint8"
        rounded = rounded_set(now.images, classes, num_classes, learning_rate=rate, levels=levels)
        return rounded.with_logits(now.labels) if now.soft else rounded

    def step(self) -> OuterStep:
        """One iteration on a segment of a drawn expert.

        Raises:
            DivergedError: the loss is not finite and `max_loss` is not set; the set is unchanged.
        """
        started = perf_counter()
        method, draws = self._method, self._generator
        index = int(torch.randint(len(self._experts), (), generator=self._expert_draws))
        end = method.window_end(self._num_epochs, self.iteration)
        start_epoch = int(torch.randint(method.min_start_epoch, end, (), generator=draws))
        gradients = self._gradients(start_epoch, self._experts[index])
        loss, limit = float(gradients.objective), method.max_loss
        skipped = limit is not None and not loss <= limit
        if not skipped and not isfinite(loss):
            raise DivergedError(
                f"iteration {self.iteration + 1}: the matching loss is {loss} from epoch "
                f"{start_epoch}, the student's learning rate {self.synthetic.learning_rate:.3g}: "
                "lower `method.step_size_rate`, `method.learning_rate` or `method.image_rate`, or "
                "set `method.max_loss` to skip such segments"
            )
        if not skipped:
            self._update(gradients)
        self.iteration += 1
        self.seconds += perf_counter() - started
        return OuterStep(self.iteration, loss, skipped)

    def _gradients(self, start_epoch: int, expert: Snapshots) -> Gradients:
        method, images = self._method, self._learned["images"]
        batches = draw_batches(
            len(images),
            method.batch_size or len(images),
            method.num_steps,
            images.shape[2],
            self._groups,
            self._generator,
        )
        start = method.start(expert(start_epoch), self._network, self._generator)
        targets = [expert(start_epoch + epochs) for epochs in method.matched_epochs]
        gradients, _ = matching_gradients(
            self._network,
            self.synthetic,
            [batch.part(self._group.rank, self._group.size) for batch in batches],
            start,
            method.matches(targets),
            momentum=method.student_momentum,
            loss_scale=method.loss_scale(start_epoch, self._num_epochs),
            first_order=method.first_order,
            all_reduce=self._sum,
        )
        return gradients

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._group.total(tensor.contiguous().clone())

    def _update(self, gradients: Gradients) -> None:
        """SGD with momentum of each learned tensor.

        The learned rate at most halves or doubles: a steep segment could turn it negative, which
        no release prevents.
        """
        eta, method = self._learned["learning_rate"], self._method
        steps = [
            ("images", self._sum(gradients.leaves[0]), method.image_rate, _OUTER_MOMENTUM),
            ("learning_rate", gradients.learning_rate, method.step_size_rate, _OUTER_MOMENTUM),
        ]
        for labels in gradients.leaves[1:]:
            steps.append(("labels", self._sum(labels), method.label_rate, _LABEL_MOMENTUM))
        for name, gradient, rate, momentum in steps:
            self._velocity[name] = momentum * self._velocity[name] + gradient
            self._learned[name] = self._learned[name] - rate * self._velocity[name]
        self._learned["learning_rate"] = self._learned["learning_rate"].clamp(eta / 2, 2 * eta)
        decay = method.image_decay
        if decay is not None:
            self._average = decay * self._average + (1 - decay) * self._learned["images"]

    def snapshot(self) -> Snapshot:
        state = {f"learned.{name}": value for name, value in self._learned.items()}
        state |= {f"velocity.{name}": value for name, value in self._velocity.items()}
        if self._method.image_decay is not None:
            state["average"] = self._average
        state["generator"] = self._generator.get_state()
        state["draws"] = self._expert_draws.get_state()
        tensors = {WEIGHT + name: tensor.cpu().clone() for name, tensor in state.items()}
        return Snapshot(tensors, {"step": self.iteration, "seconds": self.seconds})

    def restore(self, snapshot: Snapshot) -> None:
        """Resume from a snapshot of a matcher with the same network, method and labels."""
        state, device = snapshot.tensors, self._hard_labels.device
        for name in self._learned:
            self._learned[name] = state[f"{WEIGHT}learned.{name}"].to(device)
            self._velocity[name] = state[f"{WEIGHT}velocity.{name}"].to(device)
        self._average = state.get(f"{WEIGHT}average", self._average).to(device)
        self._generator.set_state(state[f"{WEIGHT}generator"])
        self._expert_draws.set_state(state[f"{WEIGHT}draws"])
        self.iteration = int(snapshot.progress["step"])
        self.seconds = float(snapshot.progress["seconds"])


def first_set(
    prepared: Prepared,
    network: FlatModule,
    last: Sequence[Callable[[], Tensor]],
    method: TrajectoryMethod,
) -> SyntheticSet:
    """Real images, their classes or DATM's first soft labels, and the first learning rate.

    `last` return the experts' parameters [P] after their last stored epochs.
    """
    per_class, labels = method.images_per_class, prepared.train_labels

    def expert_logits(theta: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(theta, batch) for batch in images.split(BATCH)])

    if method.start_from == "random_real":
        rows = torch.from_numpy(random_real(labels.cpu().numpy(), per_class, seed=method.seed))
    else:
        choose = choose_right if method.start_from == "right" else representative
        expert = last[method.seed % len(last)]()
        logits = expert_logits(expert.to(prepared.device), prepared.train)
        rows = choose(logits, labels, per_class, torch.Generator().manual_seed(method.seed))
    rows = rows.to(prepared.device)
    images, classes = prepared.train[rows].clone(), labels[rows]
    rate = torch.tensor(method.learning_rate, device=prepared.device)
    if not method.soft_labels:
        return SyntheticSet(images, classes, rate)
    thetas = (expert().to(prepared.device) for expert in last)
    logits = torch.stack([expert_logits(theta, images) for theta in thetas])
    return SyntheticSet(images, label_logits(logits, classes), rate)


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """DATM's first label logits [S, K] from E experts' logits on the images [E, S, K].

    The mean over the experts that are right; over all of them where none is (the release divides
    by zero there).
    """
    right = logits.argmax(2) == labels
    votes = torch.where(right.any(0), right, True).to(logits.dtype)[:, :, None]
    return (logits * votes).sum(0) / votes.sum(0)


@dataclass(frozen=True, slots=True)
class GivenExpert:
    """A trajectory's fingerprint, and where it lies."""

    name: str
    uri: Place[str]


@dataclass(frozen=True)
class MatchingTask(ImageTask):
    """A distillation with experts of `num_epochs` each and DSA's `groups`."""

    VERSION: ClassVar[int] = 4

    network: NetworkSettings
    method: TrajectoryMethod
    experts: tuple[GivenExpert, ...]
    num_epochs: int
    groups: tuple[Group, ...]

    def name_after(self, iteration: int) -> str:
        """The name of the stored set after an iteration, and of its receipt."""
        return fingerprint(["distil", self.fingerprint, iteration])

    @property
    def names(self) -> list[str]:
        """Of all sets that are stored."""
        return [self.name_after(iteration) for iteration in self.method.snapshots]

    def last_in_store(self, store: Store) -> int:
        """The last iteration up to which no set is missing; -1 without the first.

        A later checkpoint cannot restore a set before it that was pruned or deleted.
        """
        done = store.finished(self.KIND, self.names)
        last = -1
        for iteration, name in zip(self.method.snapshots, self.names, strict=True):
            if name not in done:
                break
            last = iteration
        return last


def run_matching(
    host: ImageHost, task: MatchingTask, group: WorkerGroup | None = None, tell: Tell | None = None
) -> None:
    """Run or resume the distillation to its last set; all workers of `group` call this.

    Every worker computes its part of every batch; rank 0 writes, and reports each `step` to `tell`.
    If the loss stops being finite, the sets so far stay and the receipts of the missing ones have
    `info["diverged"]`.

    Raises:
        DivergedError: before the first set after the start.
        ArtifactError: an expert of another network, or without an epoch that may be read.
        SpecError: no start fits the experts; several workers and a network with batch norm.
    """
    group = group or WorkerGroup()
    prepared, method, store = host.prepared, task.method, host.store
    reset_peak(prepared.device)
    method.check_window(task.num_epochs)
    if group.size > 1:
        require_no_batch_norm(prepared.network(task.network, 0), task.network.label)
    network = prepared.flat(task.network, 0)
    with ExitStack() as opened:
        trajectories = open_trajectories([e.uri for e in task.experts], network, opened)
        for trajectory in trajectories:
            trajectory.require(method.epochs_read(task.num_epochs))
        last = [partial(t.snapshot, t.epochs[-1]) for t in trajectories]
        device = prepared.device
        experts = [lambda epoch, t=t: t.snapshot(epoch).to(device) for t in trajectories]
        first = first_set(prepared, network, last, method)
        matcher = Matcher(network, first, method, experts, task.num_epochs, task.groups, group)
        classes = torch.arange(prepared.num_classes).repeat_interleave(method.images_per_class)
        losses: list[float] = []

        def store_set(iteration: int) -> None:
            name, since_last = task.name_after(iteration), losses.copy()
            losses.clear()
            if group.rank or name in store.finished(task.KIND, [name]):
                return
            table = set_table(matcher.stored(classes, prepared.num_classes))
            part = store.put_part(f"{task.KIND}/parts/{name}.parquet", table, num_tokens=0)
            info: dict[str, Any] = {
                "iteration": iteration,
                "losses": since_last,
                "learning_rate": float(matcher.synthetic.learning_rate),
                "seconds": matcher.seconds,
                "peak_bytes": peak_bytes(prepared.device),
            }
            counts = {"iterations": len(since_last)}
            store.put_receipt(task.KIND, Receipt(name, (part,), counts, info))

        def on_start(iteration: int) -> None:
            if iteration == 0:
                store_set(0)

        def on_step(done: OuterStep) -> None:
            if isfinite(done.loss):  # a skipped loss may be NaN, which JSON has no word for
                losses.append(done.loss)
            if tell is not None and group.rank == 0:
                tell("step", {"step": done.step})
            if done.step in method.snapshots:
                store_set(done.step)

        try:
            fit(
                matcher,
                Checkpoints(store, task.fingerprint),
                group,
                num_steps=method.num_iterations,
                checkpoint_every=method.interval,
                on_step=on_step,
                on_start=on_start,
                until=task.last_in_store(store),
            )
        except DivergedError as error:
            if matcher.iteration < method.interval:
                raise
            for iteration in method.snapshots:
                if iteration > matcher.iteration and group.rank == 0:
                    info = {"diverged": str(error), "iteration": matcher.iteration}
                    receipt = Receipt(task.name_after(iteration), (), {}, info)
                    store.put_receipt(task.KIND, receipt)


def require_no_batch_norm(network: torch.nn.Module, name: str) -> None:
    """Refuse batch norm where workers share a batch: each would see its part's statistics.

    Raises:
        SpecError: the network has a batch norm layer.
    """
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise SpecError(
            f"{name} has batch norm, whose statistics are the whole batch's: set "
            "`compute.distillers` to 1, or give `network` another norm"
        )
