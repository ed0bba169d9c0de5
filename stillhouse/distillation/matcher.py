"""The outer loop of trajectory matching: one update of the synthetic set for one expert segment.

Methods differ by their options alone. MTT: the defaults. TESLA: `first_order`. FTD: flat experts
and `image_average`. DATM: soft labels in the set, a window that grows, `max_loss`. AST: momentum,
balance, perturbation and matches in between.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.distillation.adjoint import alone
from stillhouse.distillation.ast import balance_factor, perturb, segment_matches
from stillhouse.distillation.augment import DSA_GROUPS, Group
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.trajectory import (
    MatchGradients,
    SyntheticSet,
    draw_batches,
    matching_gradients,
)
from stillhouse.errors import DivergedError, SpecError


@dataclass(frozen=True, slots=True)
class StartWindow:
    """Start epochs: uniform in [first, last), where `last` may grow linearly (DATM).

    At iteration 0 the end is `grows_from`, at `growth_iterations` and later it is `last`.
    """

    first: int
    last: int
    grows_from: int | None = None
    growth_iterations: int = 0

    def end(self, iteration: int) -> int:
        """The first epoch that is too late at `iteration`."""
        if self.grows_from is None or iteration >= self.growth_iterations:
            return self.last
        grown = (self.last - self.grows_from) * iteration // self.growth_iterations
        return self.grows_from + grown

    def draw(self, iteration: int, generator: torch.Generator) -> int:
        """A start epoch."""
        return int(torch.randint(self.first, self.end(iteration), (), generator=generator))

    def check(self, num_epochs: int, expert_epochs: int) -> None:
        """Refuse segments that leave the stored trajectory.

        Raises:
            SpecError: no epoch in the window, or the last target is behind the last epoch.
        """
        ends = [self.last] if self.grows_from is None else [self.grows_from, self.last]
        if not 0 <= self.first < min(ends):
            raise SpecError(
                f"no start epoch lies in [{self.first}, {min(ends)}): raise "
                "`method.max_start_epoch` or lower `method.min_start_epoch`"
            )
        if max(ends) - 1 + expert_epochs > num_epochs:
            raise SpecError(
                f"start epoch {max(ends) - 1} and {expert_epochs} epochs more lead beyond the "
                f"experts' {num_epochs}: lower `method.max_start_epoch` or raise `experts.epochs`"
            )


@dataclass(frozen=True, slots=True)
class MatchOptions:
    """One method's outer step; the defaults are MTT's for CIFAR-10 and 10 images per class.

    Attributes:
        window: start epochs.
        num_steps: N, inner steps.
        expert_epochs: M, epochs from the start to the target.
        batch_size: of an inner step; None: all images.
        augmentation: DSA groups, one drawn an inner step.
        image_rate: outer step size of the images; `step_size_rate` of eta; `label_rate` of soft
            labels.
        momentum: of the student.
        first_order: TESLA's gradient in place of the exact one.
        max_loss: an update of greater or no finite loss is skipped (DATM); None: none is.
        balanced: AST's factor by start epoch.
        perturbed: AST's start.
        intermediate: AST's matches in between; `graded` weighs them.
        image_average: decay of FTD's running average of the images.
    """

    window: StartWindow = StartWindow(0, 20)
    num_steps: int = 30
    expert_epochs: int = 2
    batch_size: int | None = None
    augmentation: tuple[Group, ...] = DSA_GROUPS
    image_rate: float = 100.0
    step_size_rate: float = 1e-5
    label_rate: float = 2.0
    momentum: float = 0.0
    first_order: bool = False
    max_loss: float | None = None
    balanced: bool = False
    perturbed: bool = False
    intermediate: bool = False
    graded: bool = False
    image_average: float | None = None


@dataclass(frozen=True, slots=True)
class OuterStep:
    """What one iteration did: its loss, terms by inner step, whether it was skipped."""

    iteration: int
    loss: float
    terms: dict[int, float]
    skipped: bool


_OUTER_MOMENTUM = 0.5
_LABEL_MOMENTUM = 0.9


class Matcher:
    """Learns a synthetic set in place of `synthetic`; its state is the whole progress.

    Args:
        network: the student; on the device of the set.
        synthetic: where to start. With float labels these are learned as well.
        options: the method.
        generator: of the CPU; draws start epochs, order, augmentation and perturbation.
        sum_over_workers: adds up a tensor over `num_workers` workers, each of which holds the same
            set and generator and computes part `rank` of every batch.
        rank: of this worker.
        num_workers: all of them.
    """

    def __init__(
        self,
        network: FlatModule,
        synthetic: SyntheticSet,
        options: MatchOptions,
        generator: torch.Generator,
        *,
        sum_over_workers: Callable[[Tensor], Tensor] = alone,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        self._network, self._options, self._generator = network, options, generator
        self._sum, self._rank, self._num_workers = sum_over_workers, rank, num_workers
        self._iteration = 0
        self._learned = {"images": synthetic.images, "learning_rate": synthetic.learning_rate}
        self._hard_labels = synthetic.labels
        if synthetic.soft:
            self._learned["labels"] = synthetic.labels
        self._velocity = {name: torch.zeros_like(v) for name, v in self._learned.items()}
        self._average = synthetic.images

    @property
    def synthetic(self) -> SyntheticSet:
        """The set as it is now."""
        labels = self._learned.get("labels", self._hard_labels)
        return SyntheticSet(self._learned["images"], labels, self._learned["learning_rate"])

    @property
    def averaged(self) -> SyntheticSet:
        """The set with the running average of its images; the same without `image_average`."""
        now = self.synthetic
        images = now.images if self._options.image_average is None else self._average
        return SyntheticSet(images, now.labels, now.learning_rate)

    def step(self, snapshot: Callable[[int], Tensor]) -> OuterStep:
        """One iteration on a segment of an expert, whose parameters at an epoch `snapshot` gives.

        Raises:
            DivergedError: the loss is not finite, and no `max_loss` skips it; the set is as before.
        """
        start_epoch = self._options.window.draw(self._iteration, self._generator)
        found = self._gradients(start_epoch, snapshot)
        loss = float(found.loss)
        limit = self._options.max_loss
        skipped = limit is not None and not loss <= limit
        if not skipped and not torch.isfinite(found.loss):
            raise DivergedError(
                f"iteration {self._iteration + 1}: the matching loss is {loss} from epoch "
                f"{start_epoch}, the student's learning rate {self.synthetic.learning_rate:.3g}: "
                "lower `method.step_size_rate`, `method.learning_rate` or `method.image_rate`, or "
                "set `method.max_loss` to skip such segments"
            )
        if not skipped:
            self._update(found)
        self._iteration += 1
        terms = {step: float(value) for step, value in sorted(found.terms.items())}
        return OuterStep(self._iteration, loss, terms, skipped)

    def _gradients(self, start_epoch: int, snapshot: Callable[[int], Tensor]) -> MatchGradients:
        options, images = self._options, self._learned["images"]
        batches = draw_batches(
            len(images),
            options.batch_size or len(images),
            options.num_steps,
            images.shape[2],
            options.augmentation,
            self._generator,
        )
        start = snapshot(start_epoch)
        if options.perturbed:
            noise = torch.randn(len(start), generator=self._generator).to(start)
            start = perturb(start, self._network.shapes, noise)
        first = 1 if options.intermediate else options.expert_epochs
        targets = [snapshot(start_epoch + i) for i in range(first, options.expert_epochs + 1)]
        last = options.window.last
        return matching_gradients(
            self._network,
            self.synthetic,
            [batch.part(self._rank, self._num_workers) for batch in batches],
            start,
            segment_matches(targets, options.num_steps, graded=options.graded),
            momentum=options.momentum,
            loss_scale=balance_factor(start_epoch, last) if options.balanced else 1.0,
            first_order=options.first_order,
            all_reduce=self._sum,
        )

    def _update(self, found: MatchGradients) -> None:
        """SGD with momentum of each learned tensor; images and labels are summed over workers.

        The learned rate halves or doubles at most: one steep segment would else turn it negative,
        and no release prevents that.
        """
        eta = self._learned["learning_rate"]
        steps = [("images", self._sum(found.images), self._options.image_rate, _OUTER_MOMENTUM)]
        steps.append(
            ("learning_rate", found.learning_rate, self._options.step_size_rate, _OUTER_MOMENTUM)
        )
        if found.labels is not None:
            labels = self._sum(found.labels)
            steps.append(("labels", labels, self._options.label_rate, _LABEL_MOMENTUM))
        for name, gradient, rate, momentum in steps:
            self._velocity[name] = momentum * self._velocity[name] + gradient
            self._learned[name] = self._learned[name] - rate * self._velocity[name]
        self._learned["learning_rate"] = self._learned["learning_rate"].clamp(eta / 2, 2 * eta)
        decay = self._options.image_average
        if decay is not None:
            self._average = decay * self._average + (1 - decay) * self._learned["images"]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that advances, as tensors: set, momentum, average, iteration, generator."""
        state = {f"learned.{name}": value for name, value in self._learned.items()}
        state |= {f"velocity.{name}": value for name, value in self._velocity.items()}
        if self._options.image_average is not None:
            state["average"] = self._average
        state["iteration"] = torch.tensor(self._iteration)
        state["generator"] = self._generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state of a matcher with the same network, options and labels."""
        device = self._hard_labels.device
        for name in self._learned:
            self._learned[name] = state[f"learned.{name}"].to(device)
            self._velocity[name] = state[f"velocity.{name}"].to(device)
        self._average = state.get("average", self._average).to(device)
        self._iteration = int(state["iteration"])
        self._generator.set_state(state["generator"].cpu())
