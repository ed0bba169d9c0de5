"""A trajectory-matching distillation as a task: resumable, its sets along the way in the store.

Every `interval` iterations the set is a part with a receipt of its own (0: the real images it
starts from), and the whole state a checkpoint, committed after them. A worker that starts again
goes on from the newest checkpoint to the same bytes (on CPUs).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from stillhouse.distillation.ast import representative_rows
from stillhouse.distillation.baselines import random_real
from stillhouse.distillation.expert_job import Trajectories
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.matcher import Matcher, MatchOptions, StartWindow
from stillhouse.distillation.methods import Ast, Datm, Ftd, Tesla, TrajectoryMethod
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.settings import Group
from stillhouse.distillation.soft_labels import choose_right, label_logits
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.stored_sets import LabelledSet, rounded_set, set_table
from stillhouse.distillation.trajectory import SyntheticSet
from stillhouse.distillation.trajectory_file import Trajectory
from stillhouse.errors import DivergedError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.device import peak_bytes, reset_peak
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fit import load_together
from stillhouse.training.group import WorkerGroup
from stillhouse.training.state import WEIGHT, Snapshot

KIND = "distilled"


@dataclass(frozen=True, slots=True)
class MatchingTask:
    """A distillation to run.

    Attributes:
        fingerprint: its name, and its checkpoints'.
        network: the student's.
        method: all its settings.
        experts: URIs of the trajectories.
        num_epochs: of the experts.
        augmentation: DSA groups.
    """

    fingerprint: str
    network: NetworkSettings
    method: TrajectoryMethod
    experts: tuple[str, ...]
    num_epochs: int
    augmentation: tuple[Group, ...]

    @property
    def points(self) -> list[int]:
        """Iterations after which the set is kept, 0 among them."""
        last, step = self.method.num_iterations, self.method.interval
        return [*range(0, last, step), last]

    def receipt(self, iteration: int) -> str:
        """The name of the receipt of one of the points."""
        return fingerprint(["distil", self.fingerprint, iteration])


def match_options(
    method: TrajectoryMethod, num_epochs: int, groups: tuple[Group, ...]
) -> MatchOptions:
    """The method's outer step."""
    last = method.window_end(num_epochs)
    window = StartWindow(method.min_start_epoch, last)
    if isinstance(method, Datm):
        first = method.first_max_start_epoch or max(method.min_start_epoch + 1, last // 2)
        growth = method.growth_iterations or max(1, method.num_iterations // 3)
        window = StartWindow(method.min_start_epoch, last, first, growth)
    window.check(num_epochs, method.expert_epochs)
    ast = method if isinstance(method, Ast) else None
    return MatchOptions(
        window=window,
        num_steps=method.num_steps,
        expert_epochs=method.expert_epochs,
        batch_size=method.batch_size,
        augmentation=groups,
        image_rate=method.image_rate,
        step_size_rate=method.step_size_rate,
        label_rate=method.label_rate,
        momentum=method.student_momentum,
        first_order=isinstance(method, Tesla),
        max_loss=method.max_loss,
        balanced=ast is not None and ast.balanced,
        perturbed=ast is not None and ast.perturbed,
        intermediate=ast is not None and ast.intermediate,
        graded=ast is not None and ast.graded,
        image_average=method.image_average if isinstance(method, Ftd) else None,
    )


def epochs_read(method: TrajectoryMethod, num_epochs: int) -> list[int]:
    """The epochs of an expert that matching may ask for: starts and what is matched."""
    first = 1 if isinstance(method, Ast) and method.intermediate else method.expert_epochs
    ahead = [0, *range(first, method.expert_epochs + 1)]
    starts = range(method.min_start_epoch, method.window_end(num_epochs))
    return sorted({start + epochs for start in starts for epochs in ahead})


def require_no_batch_norm(network: nn.Module, name: str) -> None:
    """Workers that share a batch would each take the statistics of their own part.

    Raises:
        SpecError: the network has a batch norm layer.
    """
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise SpecError(
            f"{name} has batch norm, whose statistics are the whole batch's: set "
            "`compute.distillers` to 1, or give `network` another norm"
        )


def start_rows(
    prepared: Prepared, network: FlatModule, experts: list[Trajectory], method: TrajectoryMethod
) -> Tensor:
    """Rows of the real images to start from, class by class."""
    per_class, labels = method.images_per_class, prepared.train_labels
    if method.start_from == "random_real":
        rows = random_real(labels.cpu().numpy(), per_class, seed=method.seed)
        return torch.from_numpy(rows)
    generator = torch.Generator().manual_seed(method.seed)
    last = experts[method.seed % len(experts)]
    logits = _logits(network, last.snapshot(last.epochs[-1]), prepared.train)
    if method.start_from == "right":
        return choose_right(logits, labels, per_class, generator).cpu()
    chosen: list[Tensor] = []
    for label in range(prepared.num_classes):
        own = (labels == label).nonzero()[:, 0].cpu()
        picked = representative_rows(logits[own.to(logits.device)].cpu(), per_class, generator)
        chosen.append(own[picked])
    return torch.cat(chosen)


@torch.no_grad()
def _logits(network: FlatModule, theta: Tensor, images: Tensor) -> Tensor:
    theta = theta.to(images.device)
    return torch.cat([network(theta, batch) for batch in images.split(512)])


def first_set(
    prepared: Prepared, network: FlatModule, experts: list[Trajectory], method: TrajectoryMethod
) -> SyntheticSet:
    """Real images, their classes or DATM's first soft labels, and the first learning rate."""
    rows = start_rows(prepared, network, experts, method).to(prepared.device)
    images, labels = prepared.train[rows].clone(), prepared.train_labels[rows]
    rate = torch.tensor(method.learning_rate, device=prepared.device)
    if not method.soft_labels:
        return SyntheticSet(images, labels, rate)
    last = [expert.snapshot(expert.epochs[-1]) for expert in experts]
    logits = torch.stack([_logits(network, theta, images) for theta in last])
    return SyntheticSet(images, label_logits(logits, labels), rate)


def run_matching(
    store: Store,
    prepared: Prepared,
    task: MatchingTask,
    on_step: Callable[[int, int], None],
    group: WorkerGroup | None = None,
) -> None:
    """Run the distillation, or go on with it, to its last point.

    A loss that is not finite ends it early: the receipt of its last point says so
    (`info["diverged"]`), and the sets so far stay.

    Args:
        store: where everything lies.
        prepared: the images.
        task: what to do.
        on_step: told of (iterations done, iterations in all).
        group: several workers that share every batch; rank 0 writes.

    Raises:
        DivergedError: before the first point after the start.
        ArtifactError: an expert of another network, or without an epoch that may be drawn.
        SpecError: several workers, and a network with batch norm.
    """
    group = group or WorkerGroup()
    reset_peak(prepared.device)
    network = prepared.flat(task.network, 0)
    if group.size > 1:
        require_no_batch_norm(prepared.network(task.network, 0), task.network.label)
    with Trajectories(task.experts, network) as experts:
        for expert in experts:
            expert.require(epochs_read(task.method, task.num_epochs))
        run = _MatchingRun(store, prepared, task, network, experts, group)
        with Checkpoints(store, task.fingerprint, {"task": task.fingerprint}) as checkpoints:
            run.resume(checkpoints)
            run.go_on(checkpoints, on_step)


class _MatchingRun:
    """The state of one distillation between its points."""

    def __init__(
        self,
        store: Store,
        prepared: Prepared,
        task: MatchingTask,
        network: FlatModule,
        experts: list[Trajectory],
        group: WorkerGroup,
    ) -> None:
        self._store, self._prepared, self._task, self._experts = store, prepared, task, experts
        self._group = group
        first = first_set(prepared, network, experts, task.method)
        self._classes = torch.arange(prepared.num_classes).repeat_interleave(
            task.method.images_per_class
        )
        self._draws = torch.Generator().manual_seed(task.method.seed + 1)
        self._matcher = Matcher(
            network,
            first,
            match_options(task.method, task.num_epochs, task.augmentation),
            torch.Generator().manual_seed(task.method.seed),
            sum_over_workers=lambda tensor: group.total(tensor.contiguous().clone()),
            rank=group.rank,
            num_workers=group.size,
        )
        self._iteration = 0
        self._seconds = 0.0
        self._losses: list[float] = []

    def resume(self, checkpoints: Checkpoints) -> None:
        """Take up the newest checkpoint, or keep the start as point 0.

        A checkpoint behind a set that is gone (pruned, deleted) is of no use: the set lies before.
        """
        found = load_together(checkpoints, self._group, until=self._last_in_store())
        if found is None:
            self._keep(checkpoints)
            return
        tensors = {n.removeprefix(WEIGHT): t for n, t in found.snapshot.tensors.items()}
        self._draws.set_state(tensors.pop("draws"))
        self._matcher.load_state_dict(tensors)
        self._iteration = found.step
        self._seconds = float(found.snapshot.progress["seconds"])

    def _last_in_store(self) -> int:
        """The last point up to which the store has every set; -1 without the first."""
        names = [self._task.receipt(point) for point in self._task.points]
        done = self._store.finished(KIND, names)
        count = next((i for i, name in enumerate(names) if name not in done), len(names))
        return self._task.points[count - 1] if count else -1

    def go_on(self, checkpoints: Checkpoints, on_step: Callable[[int, int], None]) -> None:
        """All iterations that are left."""
        last = self._task.method.num_iterations
        points = set(self._task.points)
        while self._iteration < last:
            started = perf_counter()
            try:
                self._step()
            except DivergedError as error:
                if self._iteration < self._task.method.interval:
                    raise
                self._give_up(str(error))
                return
            self._seconds += perf_counter() - started
            on_step(self._iteration, last)
            if self._iteration in points:
                self._keep(checkpoints)

    def _step(self) -> None:
        index = int(torch.randint(len(self._experts), (), generator=self._draws))
        device = self._prepared.device
        done = self._matcher.step(lambda epoch: self._experts[index].snapshot(epoch).to(device))
        self._iteration = done.iteration
        if isfinite(done.loss):  # what `max_loss` skipped may be none, and JSON has no word for it
            self._losses.append(done.loss)

    def _give_up(self, reason: str) -> None:
        """The points behind the last one are marked with why there is nothing."""
        if self._group.rank == 0:
            for point in [p for p in self._task.points if p > self._iteration]:
                info: dict[str, Any] = {"diverged": reason, "iteration": self._iteration}
                self._store.put_receipt(KIND, Receipt(self._task.receipt(point), (), {}, info))

    def _keep(self, checkpoints: Checkpoints) -> None:
        """The set as a part and its receipt, where they are missing, then the checkpoint."""
        losses, self._losses = self._losses, []
        if self._group.rank != 0:
            return
        name = self._task.receipt(self._iteration)
        if name not in self._store.finished(KIND, [name]):
            table = set_table(self._set())
            part = self._store.put_part(f"{KIND}/parts/{name}.parquet", table, num_tokens=0)
            info = {
                "iteration": self._iteration,
                "losses": losses,
                "learning_rate": float(self._matcher.synthetic.learning_rate),
                "seconds": self._seconds,
                "peak_bytes": peak_bytes(self._prepared.device),
            }
            self._store.put_receipt(KIND, Receipt(name, (part,), {"iterations": len(losses)}, info))
        tensors = {WEIGHT + n: t.cpu().clone() for n, t in self._matcher.state_dict().items()}
        tensors[WEIGHT + "draws"] = self._draws.get_state()
        progress = {"step": self._iteration, "seconds": self._seconds}
        checkpoints.save(Snapshot(tensors, progress))
        checkpoints.wait()

    def _set(self) -> LabelledSet:
        """The set as it would be delivered now."""
        now = self._matcher.averaged
        return rounded_set(
            now.images,
            self._classes,
            self._prepared.num_classes,
            label_logits=now.labels if now.soft else None,
            learning_rate=float(now.learning_rate),
            levels=self._task.method.stored_as == "uint8",
        )
