"""A trajectory-matching distillation in the store: resumable, by one worker or several.

Every `interval` iterations the set is a part with a receipt of its own (0: the real images it
starts from), and the whole state a checkpoint, committed after them. Workers that start again go on
from the newest checkpoint to the same bytes (on CPUs).
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, ClassVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from stillhouse.distillation.experts import open_trajectories
from stillhouse.distillation.matching import Matcher, OuterStep, TrajectoryMethod, first_set
from stillhouse.distillation.prepared import ImageHost
from stillhouse.distillation.recipes import Group
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.stored_sets import set_table
from stillhouse.distillation.tasks import ImageTask
from stillhouse.errors import DivergedError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.device import peak_bytes, reset_peak
from stillhouse.storage.artifact import Receipt, Store
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fit import fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.task import Tell


@dataclass(frozen=True, slots=True)
class GivenExpert:
    """A trajectory: known by `name`, and found at `uri`."""

    name: str
    uri: str

    def identity(self) -> str:
        """Its name, wherever it lies."""
        return self.name


@dataclass(frozen=True)
class MatchingTask(ImageTask):
    """A distillation to run: with experts of `num_epochs` each, and DSA's `groups`."""

    VERSION: ClassVar[int] = 3

    network: NetworkSettings
    method: TrajectoryMethod
    experts: tuple[GivenExpert, ...]
    num_epochs: int
    groups: tuple[Group, ...]

    def point(self, iteration: int) -> str:
        """The name of the set, and of its receipt, after so many iterations."""
        return fingerprint(["distil", self.fingerprint, iteration])

    @property
    def points(self) -> list[str]:
        """The names of all sets that are kept."""
        return [self.point(iteration) for iteration in self.method.points]

    def last_in_store(self, store: Store) -> int:
        """The last iteration up to which the store has every set; -1 without the first.

        A checkpoint behind a set that is gone (pruned, deleted) is of no use: the set lies before.
        """
        done = store.finished(self.KIND, self.points)
        found = -1
        for iteration, name in zip(self.method.points, self.points, strict=True):
            if name not in done:
                break
            found = iteration
        return found


def run_matching(
    host: ImageHost, task: MatchingTask, group: WorkerGroup | None = None, tell: Tell | None = None
) -> None:
    """Run the distillation, or go on with it, to its last set; all workers of `group` call this.

    Every worker computes its part of every batch; rank 0 writes. A loss that is not finite ends it
    early: the receipts of the sets that are not there say so (`info["diverged"]`), and the sets so
    far stay. `tell` is told of every `step`.

    Raises:
        DivergedError: before the first set after the start.
        ArtifactError: an expert of another network, or without an epoch that may be drawn.
        SpecError: no start fits the experts; several workers, and a network with batch norm.
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

        def keep(iteration: int) -> None:
            """The set as a part and its receipt, where they are missing."""
            name, since = task.point(iteration), losses.copy()
            losses.clear()
            if group.rank or name in store.finished(task.KIND, [name]):
                return
            table = set_table(matcher.stored(classes, prepared.num_classes))
            part = store.put_part(f"{task.KIND}/parts/{name}.parquet", table, num_tokens=0)
            info: dict[str, Any] = {
                "iteration": iteration,
                "losses": since,
                "learning_rate": float(matcher.synthetic.learning_rate),
                "seconds": matcher.seconds,
                "peak_bytes": peak_bytes(prepared.device),
            }
            store.put_receipt(task.KIND, Receipt(name, (part,), {"iterations": len(since)}, info))

        def on_start(iteration: int) -> None:
            if iteration == 0:
                keep(0)

        def on_step(done: OuterStep) -> None:
            if isfinite(done.loss):  # what `max_loss` skipped may be none, and JSON has no word
                losses.append(done.loss)
            if tell is not None and group.rank == 0:
                tell("step", {"step": done.step})
            if done.step in method.points:
                keep(done.step)

        try:
            fit(
                matcher,
                Checkpoints(store, task.fingerprint, {"task": task.fingerprint}),
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
            for iteration in method.points:
                if iteration > matcher.iteration and group.rank == 0:
                    info = {"diverged": str(error), "iteration": matcher.iteration}
                    store.put_receipt(task.KIND, Receipt(task.point(iteration), (), {}, info))


def require_no_batch_norm(network: torch.nn.Module, name: str) -> None:
    """Workers that share a batch would each take the statistics of their own part.

    Raises:
        SpecError: the network has a batch norm layer.
    """
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise SpecError(
            f"{name} has batch norm, whose statistics are the whole batch's: set "
            "`compute.distillers` to 1, or give `network` another norm"
        )
