"""The outer loop of trajectory matching: one update of the synthetic set for one expert segment.

`TrajectoryMethod` has the settings that all of these methods share, and MTT's behaviour; a method
changes what its paper changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.distillation.adjoint import FlatModule, Gradients
from stillhouse.distillation.evaluate import BATCH
from stillhouse.distillation.method import Method
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.real_images import choose_right, random_real, representative
from stillhouse.distillation.recipes import Group, ProtocolName
from stillhouse.distillation.spec import DistillSpec, ExpertSettings
from stillhouse.distillation.stored_sets import LabelledSet, rounded_set
from stillhouse.distillation.trajectory import (
    Match,
    SyntheticSet,
    draw_batches,
    matching_gradients,
)
from stillhouse.errors import DivergedError, SpecError
from stillhouse.spec import Count
from stillhouse.training.group import WorkerGroup
from stillhouse.training.state import WEIGHT, Snapshot

_Positive = Annotated[float, Field(gt=0)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]
_OUTER_MOMENTUM = 0.5
_LABEL_MOMENTUM = 0.9
_MAX_START = 20
Snapshots = Callable[[int], Tensor]
"""An expert: its parameters [P] after so many epochs, on the device of the images."""
StartFrom = Literal["random_real", "representative", "right"]


class TrajectoryMethod(Method):
    """Synthetic images whose training follows where experts went."""

    matching: ClassVar[bool] = True
    protocol: ClassVar[ProtocolName] = "p1"
    experts: ClassVar[Literal["plain", "smooth", "flat"]] = "plain"
    """Its own kind of `experts.smoothing`."""
    first_order: ClassVar[bool] = False
    """TESLA's gradient in place of the exact one."""

    num_iterations: Count = Field(default=5_000, description="updates of the images")
    num_steps: Count = Field(default=30, description="N, steps of the student an iteration")
    expert_epochs: Count = Field(default=2, description="M, epochs of an expert to catch up with")
    min_start_epoch: Annotated[int, Field(ge=0)] = 0
    max_start_epoch: Count | None = Field(
        default=None,
        description="students start at epochs before this one; default 20, less where `experts` "
        "have fewer epochs",
    )
    batch_size: Count | None = Field(default=None, description="of a student's step; default all")
    image_rate: _Positive = Field(default=100.0, description="step size of the images")
    step_size_rate: Annotated[float, Field(ge=0)] = Field(
        default=1e-5, description="step size of the learned learning rate"
    )
    learning_rate: _Positive = Field(
        default=0.01, description="the student's at first; it is learned with the images"
    )
    student_momentum: _Momentum = 0.0
    max_loss: _Positive | None = Field(
        default=None, description="an iteration of greater or no finite loss is skipped"
    )
    start_from: StartFrom = Field(
        default="random_real",
        description="real images: random, of clusters, or such that an expert gets right",
    )
    soft_labels: bool = Field(default=False, description="labels are learned as well (DATM)")
    label_rate: _Positive = Field(default=2.0, description="step size of soft labels")
    evaluate_every: Count | None = Field(
        default=None,
        description="iterations between the sets that are compared on the validation part; "
        "default a tenth of all",
    )
    stored_as: Literal["uint8", "float32"] = Field(
        default="uint8",
        description="uint8: 256 levels between the images' own least and greatest value",
    )

    @property
    def interval(self) -> int:
        """Iterations between two evaluations."""
        return self.evaluate_every or max(1, self.num_iterations // 10)

    @property
    def points(self) -> list[int]:
        """Iterations after which the set is kept, 0 among them."""
        return [*range(0, self.num_iterations, self.interval), self.num_iterations]

    @property
    def image_decay(self) -> float | None:
        """Of the running average of the images that is kept in place of them; None for no such."""
        return None

    @property
    def label_kind(self) -> str:
        """Classes, or logits that are learned."""
        return "logits" if self.soft_labels else "classes"

    @property
    def matched_epochs(self) -> range:
        """How many epochs behind the start an expert is matched."""
        return range(self.expert_epochs, self.expert_epochs + 1)

    def window_end(self, num_epochs: int, iteration: int | None = None) -> int:
        """The first start epoch that is too late, at an iteration or at the last one."""
        last = max(1, num_epochs - self.expert_epochs + 1)
        return self.max_start_epoch or min(_MAX_START, last)

    def start(self, theta: Tensor, network: FlatModule, generator: torch.Generator) -> Tensor:
        """Where the student starts that an expert's theta [P] is given for."""
        return theta

    def loss_scale(self, start_epoch: int, num_epochs: int) -> float:
        """Times the student's loss."""
        return 1.0

    def matches(self, targets: Sequence[Tensor]) -> tuple[Match, ...]:
        """What is matched where, of an expert's parameters after each of `matched_epochs`."""
        return (Match(self.num_steps, targets[-1]),)

    def epochs_read(self, num_epochs: int) -> list[int]:
        """The epochs of an expert that may be asked for: starts and what is matched."""
        starts = range(self.min_start_epoch, self.window_end(num_epochs))
        return sorted({start + ahead for start in starts for ahead in (0, *self.matched_epochs)})

    def epochs_kept(self, settings: ExpertSettings) -> tuple[int, ...]:
        """What is stored of an expert: also the last where images or labels are chosen by it."""
        if settings.keep == "all":
            return tuple(range(settings.epochs + 1))
        end = self.window_end(settings.epochs) - 1 + self.expert_epochs
        last = {settings.epochs} if self.start_from != "random_real" or self.soft_labels else set()
        return tuple(sorted({*range(self.min_start_epoch, end + 1)} | last))

    def check_spec(self, spec: DistillSpec) -> None:
        """As `check_window`, where experts are not given."""
        experts = spec.experts or ExpertSettings()
        if experts.path is None:
            self.check_window(experts.epochs)

    def check_window(self, num_epochs: int) -> None:
        """Refuse starts and targets outside the epochs of experts.

        Raises:
            SpecError: no epoch is a start, or the last target is behind the last epoch.
        """
        end = self.window_end(num_epochs)
        if self.min_start_epoch >= end:
            raise SpecError(
                f"no start epoch lies in [{self.min_start_epoch}, {end}): raise "
                "`method.max_start_epoch` or lower `method.min_start_epoch`"
            )
        if end - 1 + self.expert_epochs > num_epochs:
            raise SpecError(
                f"a start at epoch {end - 1} and {self.expert_epochs} epochs more lead beyond the "
                f"experts' {num_epochs}: lower `method.max_start_epoch` or raise `experts.epochs`"
            )


@dataclass(frozen=True, slots=True)
class OuterStep:
    """What one iteration did: its loss, terms by inner step, whether it was skipped."""

    step: int
    loss: float
    terms: dict[int, float]
    skipped: bool


class Matcher:
    """Learns a synthetic set; its snapshot is the whole progress.

    Args:
        network: the student; on the device of the set.
        first: where to start. With float labels these are learned as well.
        method: the method.
        experts: to draw segments from.
        num_epochs: of each expert.
        groups: of DSA.
        group: workers, each of which holds the same set and draws, and computes its part of every
            batch.
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
        """The set as it is now."""
        labels = self._learned.get("labels", self._hard_labels)
        return SyntheticSet(self._learned["images"], labels, self._learned["learning_rate"])

    @property
    def averaged(self) -> SyntheticSet:
        """The set with the running average of its images; the same without one."""
        now = self.synthetic
        images = now.images if self._method.image_decay is None else self._average
        return SyntheticSet(images, now.labels, now.learning_rate)

    def stored(self, classes: Tensor, num_classes: int) -> LabelledSet:
        """The set as it would be delivered now; its images began as `classes`."""
        now, method = self.averaged, self._method
        rate, levels = float(now.learning_rate), method.stored_as == "uint8"
        found = rounded_set(now.images, classes, num_classes, learning_rate=rate, levels=levels)
        return found.with_logits(now.labels) if now.soft else found

    def step(self) -> OuterStep:
        """One iteration on a segment of a drawn expert.

        Raises:
            DivergedError: the loss is not finite, and no `max_loss` skips it; the set is as before.
        """
        started = perf_counter()
        method, draws = self._method, self._generator
        index = int(torch.randint(len(self._experts), (), generator=self._expert_draws))
        end = method.window_end(self._num_epochs, self.iteration)
        start_epoch = int(torch.randint(method.min_start_epoch, end, (), generator=draws))
        found = self._gradients(start_epoch, self._experts[index])
        loss, limit = float(found.objective), method.max_loss
        skipped = limit is not None and not loss <= limit
        if not skipped and not isfinite(loss):
            raise DivergedError(
                f"iteration {self.iteration + 1}: the matching loss is {loss} from epoch "
                f"{start_epoch}, the student's learning rate {self.synthetic.learning_rate:.3g}: "
                "lower `method.step_size_rate`, `method.learning_rate` or `method.image_rate`, or "
                "set `method.max_loss` to skip such segments"
            )
        if not skipped:
            self._update(found)
        self.iteration += 1
        self.seconds += perf_counter() - started
        terms = {step: float(value) for step, value in sorted(found.terms.items())}
        return OuterStep(self.iteration, loss, terms, skipped)

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
        found, _ = matching_gradients(
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
        return found

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._group.total(tensor.contiguous().clone())

    def _update(self, found: Gradients) -> None:
        """SGD with momentum of each learned tensor; images and labels are summed over workers.

        The learned rate halves or doubles at most: one steep segment would else turn it negative,
        and no release prevents that.
        """
        eta, method = self._learned["learning_rate"], self._method
        steps = [
            ("images", self._sum(found.leaves[0]), method.image_rate, _OUTER_MOMENTUM),
            ("learning_rate", found.learning_rate, method.step_size_rate, _OUTER_MOMENTUM),
        ]
        for labels in found.leaves[1:]:
            steps.append(("labels", self._sum(labels), method.label_rate, _LABEL_MOMENTUM))
        for name, gradient, rate, momentum in steps:
            self._velocity[name] = momentum * self._velocity[name] + gradient
            self._learned[name] = self._learned[name] - rate * self._velocity[name]
        self._learned["learning_rate"] = self._learned["learning_rate"].clamp(eta / 2, 2 * eta)
        decay = method.image_decay
        if decay is not None:
            self._average = decay * self._average + (1 - decay) * self._learned["images"]

    def snapshot(self) -> Snapshot:
        """Everything that advances: set, momentum, average, iteration, generators."""
        state = {f"learned.{name}": value for name, value in self._learned.items()}
        state |= {f"velocity.{name}": value for name, value in self._velocity.items()}
        if self._method.image_decay is not None:
            state["average"] = self._average
        state["generator"] = self._generator.get_state()
        state["draws"] = self._expert_draws.get_state()
        tensors = {WEIGHT + name: tensor.cpu().clone() for name, tensor in state.items()}
        return Snapshot(tensors, {"step": self.iteration, "seconds": self.seconds})

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of a matcher with the same network, method and labels."""
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

    `last` give the experts' parameters [P] after their last stored epochs.
    """
    per_class, labels = method.images_per_class, prepared.train_labels
    if method.start_from == "random_real":
        rows = torch.from_numpy(random_real(labels.cpu().numpy(), per_class, seed=method.seed))
    else:
        choose = choose_right if method.start_from == "right" else representative
        expert = last[method.seed % len(last)]()
        logits = expert_logits(network, expert.to(prepared.device), prepared.train)
        rows = choose(logits, labels, per_class, torch.Generator().manual_seed(method.seed))
    rows = rows.to(prepared.device)
    images, classes = prepared.train[rows].clone(), labels[rows]
    rate = torch.tensor(method.learning_rate, device=prepared.device)
    if not method.soft_labels:
        return SyntheticSet(images, classes, rate)
    thetas = (expert().to(prepared.device) for expert in last)
    logits = torch.stack([expert_logits(network, theta, images) for theta in thetas])
    return SyntheticSet(images, label_logits(logits, classes), rate)


@torch.no_grad()
def expert_logits(network: FlatModule, theta: Tensor, images: Tensor) -> Tensor:
    """Of images [N, C, H, W]: [N, num_classes]."""
    return torch.cat([network(theta, batch) for batch in images.split(BATCH)])


def label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """DATM's first label logits [S, K] from E experts' logits on the images [E, S, K].

    The mean over the experts that are right; over all of them where none is (the release divides
    by zero there).
    """
    right = logits.argmax(2) == labels
    votes = torch.where(right.any(0), right, True).to(logits.dtype)[:, :, None]
    return (logits * votes).sum(0) / votes.sum(0)
