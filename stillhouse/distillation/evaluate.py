"""How good a distilled set is: the accuracy of a fresh network that was trained on it.

Three published protocols are named: `p1` (MTT and what follows it), `p2` (SRe2L and INFER on
CIFAR), `p3` (RDED). All of them choose on the test set in print: p1 the best distillation step, p2
and p3 the best epoch. Here the test set is touched once, after the last epoch; `published=True`
repeats the choice of the epoch, for comparison with printed numbers only (the choice of the step
is the job's, for it takes all sets). Numbers of different protocols do not compare.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stillhouse.distillation.augment import DSA_GROUPS, augment, draw_augmentation
from stillhouse.distillation.fit import Augment, fit
from stillhouse.distillation.labels import Objective
from stillhouse.distillation.settings import Recipe, ViewSettings

ProtocolName = Literal["p1", "p2", "p3"]
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Protocol:
    """A named way to evaluate.

    Attributes:
        recipe: how the network is trained.
        temperature: of soft labels.
        check_every: epochs between the tests that the published figure is the best of.
        check_after: the share of the epochs that pass before the first of them.
    """

    recipe: Recipe
    temperature: float
    check_every: int
    check_after: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracies in [0, 1] of one network.

    Attributes:
        final: after the last epoch.
        best: the best of all checks; `final` where there was only that one.
        checks: (finished epochs, accuracy).
        losses: the mean training loss of each epoch.
    """

    final: float
    best: float
    checks: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]


def named_protocol(
    name: ProtocolName,
    *,
    images_per_class: int,
    num_classes: int,
    learning_rate: float | None = None,
    factor: int = 1,
) -> Protocol:
    """A published protocol for a set.

    Args:
        name: p1, p2 or p3.
        images_per_class: of the set; decides p3's batch.
        num_classes: likewise.
        learning_rate: p1: the one that was learned with the set; default 0.01.
        factor: p3: patches along a side of RDED's images.
    """
    if name == "p1":
        recipe = Recipe(
            optimiser="sgd",
            learning_rate=learning_rate or 0.01,
            weight_decay=5e-4,
            epochs=1001,
            batch_size=256,
            schedule="step",
            views=ViewSettings(crop="none", flip=False, mix="none"),
        )
        return Protocol(recipe, temperature=1.0, check_every=1, check_after=1.0)
    if name == "p2":
        recipe = Recipe(epochs=400, batch_size=128)
        return Protocol(recipe, temperature=30.0, check_every=10, check_after=0.0)
    batch = 10 if images_per_class < 10 else 50 if images_per_class < 50 else 100
    views = ViewSettings(
        crop="resized", min_scale=1 / factor, mix="cutmix", mix_beta=1.0, patches=factor
    )
    recipe = Recipe(
        epochs=300,
        batch_size=batch * (2 if num_classes >= 100 else 1),
        schedule="half_cosine",
        views=views,
    )
    return Protocol(recipe, temperature=20.0, check_every=1, check_after=0.8)


def evaluate(
    network: nn.Module,
    images: Tensor,
    objective: Objective,
    protocol: Protocol,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    seed: int,
    augmentation: Augment | None = None,
    stored_epochs: int | None = None,
    published: bool = False,
) -> Evaluation:
    """Train a fresh network in place on a distilled set and test it.

    Args:
        network: freshly initialised, on the device of all tensors.
        images: the set, standardised [N, C, H, W].
        objective: towards its labels (`labels`, `nrr_dd.towards_distances`).
        protocol: training recipe and checks.
        test_images: standardised [n, C, H, W].
        test_labels: int64 [n].
        seed: of the order and the views.
        augmentation: `siamese_augmentation` for p1.
        stored_epochs: how many epochs of stored labels there are, if they are fewer.
        published: test at the protocol's checks as well, so that `best` is the printed figure.

    Raises:
        DivergedError: the training loss is NaN or infinite.
    """
    last = protocol.recipe.epochs
    checks: list[tuple[int, float]] = []

    def check(epoch: int) -> None:
        due = epoch > protocol.check_after * last and epoch % protocol.check_every == 0
        if epoch == last or (published and due):
            checks.append((epoch, accuracy(network, test_images, test_labels)))

    losses = fit(
        network,
        images,
        objective,
        protocol.recipe,
        seed=seed,
        augmentation=augmentation,
        stored_epochs=stored_epochs,
        after_epoch=check,
    )
    best = max(value for _, value in checks)
    return Evaluation(checks[-1][1], best, tuple(checks), tuple(losses))


def siamese_augmentation(image_size: int, seed: int) -> Augment:
    """DSA as p1 trains with it: each call draws one group for the batch, from the seed on."""
    generator = torch.Generator().manual_seed(seed)

    def apply(images: Tensor) -> Tensor:
        return augment(images, draw_augmentation(DSA_GROUPS, len(images), image_size, generator))

    return apply


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [N, C, H, W] whose largest logit is that of their class."""
    network.eval()
    right = sum(
        (network(batch).argmax(1) == classes).sum()
        for batch, classes in zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    )
    return int(right) / len(labels)
