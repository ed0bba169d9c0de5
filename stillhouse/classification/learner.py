"""A network for classes and its objective, as a trainer trains them.

An objective for images is a class made as `Class(facts, **settings)`, called with the network,
images [b, C, H, W] and the signals of these rows: `labels` and `rows` int64 [b], classes (-1 of
unlabelled images) and numbers in the training part, and `logits.<i>` [b, C] of each teacher. It may
have all that `stillhouse.training.objectives.Objective` lists, and a static `columns(columns, bags,
settings, num_classes)` that replaces the signals of all images.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from stillhouse.errors import ModelError, SpecError
from stillhouse.models.device import initialised
from stillhouse.spec import Optimisation
from stillhouse.training.group import WorkerGroup
from stillhouse.training.learner import Learner
from stillhouse.training.objectives import LossValue

LABELS, ROWS = "labels", "rows"


def teacher_logits(teacher: int) -> str:
    """The signal with a teacher's logits, such as `logits.0`."""
    return f"logits.{teacher}"


def mean_over_teachers(
    shares: Sequence[float], signals: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean, weighed by the teachers' shares, of a function of each one's logits [b, C]."""
    values = [s * function(signals[teacher_logits(i)]) for i, s in enumerate(shares)]
    return torch.stack(values).sum(0)


@dataclass(frozen=True, slots=True)
class ClassifierFacts:
    """What an objective for images is made with.

    Attributes:
        network: that is trained.
        num_classes, num_images: of the training set, unlabelled images included.
        shape: (C, H, W) of an image, (D,) of a vector, (T,) of tokens.
        teachers: the share of each, adding up to 1.
        models: the teachers' networks, frozen, for the student's kind of images; none where their
            logits are stored.
        unlabelled_share: of every batch; None where all images have labels.
        seed: of the training.
        group: its workers.
    """

    network: nn.Module
    num_classes: int
    num_images: int
    shape: tuple[int, ...]
    teachers: tuple[float, ...] = ()
    models: tuple[nn.Module, ...] = ()
    unlabelled_share: float | None = None
    seed: int = 0
    group: WorkerGroup = field(default_factory=WorkerGroup)


class ImageLearner(Learner):
    """A network on batches of images.

    Args:
        make: makes the objective, with weights drawn from `seed`.
        teachers: answer to the images of every forward pass; none where answers are stored.

    Raises:
        SpecError: batch norm on more than one worker.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: None,
        settings: Optimisation,
        *,
        device: torch.device,
        group: WorkerGroup,
        make: Callable[[], Any],
        teachers: Sequence[nn.Module] = (),
    ) -> None:
        made = initialised(make, settings.seed)
        if isinstance(made, nn.Module):
            made.to(device)
        super().__init__(model, made, settings, group)
        self._teachers = tuple(teacher.to(device) for teacher in teachers)
        if group.size > 1 and any(isinstance(module, _BatchNorm) for module in self.modules()):
            raise SpecError(
                "`compute.trainers` above 1 splits batches, but the network or its objective has "
                "batch norm, whose statistics are of a batch: set one trainer, or another norm"
            )

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters, and the buffers that state dicts have, such as means of batch norm."""
        return self.trained | kept_buffers(self.model) | _of_objective(self.objective)

    def forward(self, inputs: Tensor, signals: Mapping[str, Tensor]) -> LossValue:
        return super().forward(inputs, self._answered(inputs, signals))

    def survey(self, inputs: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        return super().survey(inputs, self._answered(inputs, signals))

    @torch.no_grad()
    def _answered(self, inputs: Tensor, signals: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The signals, with the answers of teachers that are here."""
        answers = {teacher_logits(i): one(inputs) for i, one in enumerate(self._teachers)}
        return {**signals, **answers}


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that its state dict has."""
    kept = module.state_dict(keep_vars=True)
    return {name: value for name, value in kept.items() if not isinstance(value, nn.Parameter)}


def _of_objective(objective: Any) -> dict[str, Tensor]:
    own = objective if isinstance(objective, nn.Module) else nn.Module()
    return {f"objective.{name}": value for name, value in kept_buffers(own).items()}


def classifier_layer(network: nn.Module) -> nn.Linear:
    """The last layer of a network, its attribute `classifier`.

    Raises:
        ModelError: it has none.
    """
    layer = getattr(network, "classifier", None)
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{type(network).__name__} has no linear layer `classifier`, which the objective "
            "(`train.objective`) reads"
        )
    return layer


@contextmanager
def reading(*modules: nn.Module) -> Generator[list[Tensor]]:
    """Collects what modules return in forward passes meanwhile, in the order of the calls."""
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda *args: found.append(args[2])) for m in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def with_features(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C], and the features [B, D] that the network's classifier reads."""
    found: list[Tensor] = []
    layer = classifier_layer(network)
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        logits = network(images)
    finally:
        handle.remove()
    return logits, found[-1]
