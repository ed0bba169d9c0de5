"""Training on a set: objectives, schedules, protocols, accuracy."""

import math

import numpy as np
import pytest
import torch
from small_networks import FlatHead, noise, seeded, teacher, tensors, towards_teachers

from stillhouse.distillation.augment import Views, mixup
from stillhouse.distillation.evaluate import (
    accuracy,
    epoch_rate,
    fit,
    label_views,
    mean_logits,
    mixed_cross_entropy,
    soft_loss,
    towards_classes,
    towards_static,
    towards_stored,
)
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.images import load_images
from stillhouse.distillation.preprocessing import fit_standardisation
from stillhouse.distillation.recipes import Recipe, ViewSettings, published
from stillhouse.errors import DivergedError

VECTOR = tensors("dd_infer_03_static_label.npz")


def view(rows, partners, weight, images=None, start=0, epoch=0):
    return Views(images, torch.tensor(rows), torch.tensor(partners), weight, epoch, start)


class Fixed(torch.nn.Module):
    """A teacher that says what it was given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def test_static_labels_and_their_mixture_reproduce_the_reference():
    teachers = [Fixed(logits) for logits in VECTOR["teacher_logits"]]
    mean = mean_logits(teachers, noise(6, 1, 2, 2))
    torch.testing.assert_close(mean, VECTOR["mean_logits"], rtol=1e-5, atol=1e-6)
    mixed = mixup(mean, VECTOR["mix_index"], VECTOR["lam"].item())
    torch.testing.assert_close(mixed, VECTOR["mixed_logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [30, 20, 1])
def test_soft_loss_and_its_gradient_reproduce_the_reference(temperature):
    student = VECTOR["student_logits"].clone().requires_grad_()
    views = view(list(range(6)), VECTOR["mix_index"].tolist(), VECTOR["lam"].item())
    loss = towards_static(VECTOR["mean_logits"], temperature)(student, views)
    torch.testing.assert_close(loss, VECTOR[f"kl_T{temperature}"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, [student])
    expected = VECTOR[f"grad_T{temperature}"]
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    torch.testing.assert_close(
        soft_loss(student, VECTOR["mixed_logits"], temperature), loss, rtol=1e-5, atol=1e-8
    )


def test_cross_entropy_with_classes_and_mixtures_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    views = view([1, 2], [0, 2], 0.25)
    expected = [0.25 * math.log(4 / 3) + 0.75 * math.log(4), math.log(2)]
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, views), torch.tensor(expected))
    loss = towards_classes(labels)(logits, views)
    torch.testing.assert_close(loss, torch.tensor(sum(expected) / 2))


STILL = ViewSettings(crop="none", flip=False, mix="none")


def plan(epochs=4, **recipe):
    settings = {"epochs": epochs, "batch_size": 32, "views": STILL, "learning_rate": 0.01}
    return Recipe(**settings | recipe)


def protocol(name, images_per_class, num_classes=10, **changes):
    return published(name, images_per_class=images_per_class, num_classes=num_classes, **changes)


def test_the_published_protocols():
    p1 = protocol("p1", 1, learning_rate=0.02).recipe
    assert (p1.optimiser, p1.learning_rate, p1.epochs) == ("sgd", 0.02, 1001)
    rates = [epoch_rate(p1, epoch) for epoch in (0, 501, 502, 1000)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002])
    p2 = protocol("p2", 10)
    assert (p2.recipe.views.mix, p2.temperature, p2.recipe.epochs) == ("mixup", 30, 400)
    assert epoch_rate(p2.recipe, 200) == pytest.approx(5e-4)
    sizes = [(1, 10), (10, 10), (50, 10), (10, 100)]
    batches = [protocol("p3", *size).recipe.batch_size for size in sizes]
    assert batches == [10, 50, 100, 100]
    p3 = protocol("p3", 10, factor=2)
    assert epoch_rate(p3.recipe, 300) == pytest.approx(5e-4)
    assert p3.recipe.views.min_scale == 0.5 and p3.recipe.views.patches == 2


def test_a_network_learns_digits_from_few_real_images():
    parts = load_images(ImageData(dataset="digits"))
    standardisation = fit_standardisation(parts.train)
    train, test = (
        standardisation.apply(torch.from_numpy(part.pixels())) for part in (parts.train, parts.test)
    )
    labels = torch.from_numpy(parts.train.labels)[:300]
    network = seeded(lambda: FlatHead(width=8, num_classes=10))
    fit(network, train[:300], towards_classes(labels), plan(12), seed=0)
    assert accuracy(network, test, torch.from_numpy(parts.test.labels)) > 0.8


def test_accuracy_by_hand():
    class First(torch.nn.Module):
        def forward(self, images):
            return torch.stack([images[:, 0, 0, 0], -images[:, 0, 0, 0]], 1)

    images = torch.tensor([1.0, -1.0, 2.0, -2.0]).view(4, 1, 1, 1)
    assert accuracy(First(), images, torch.tensor([0, 1, 0, 0])) == 0.75


@pytest.mark.parametrize("schedule", ["cosine", "half_cosine", "step"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_the_same_seed_gives_the_same_bits(optimiser, schedule):
    images, labels = noise(20, 1, 8, 8), torch.arange(20) % 3
    recipe = Recipe(
        optimiser=optimiser, schedule=schedule, epochs=4, batch_size=8, views=ViewSettings()
    )

    def run(seed):
        network = seeded(FlatHead)
        fit(network, images, towards_classes(labels), recipe, seed=seed)
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_biases_and_norms_have_no_weight_decay():
    network = seeded(FlatHead)
    recipe = Recipe(epochs=1, weight_decay=0.5, learning_rate=0.5, batch_size=4, views=STILL)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    fit(network, noise(4, 1, 8, 8), lambda logits, _: 0 * logits.sum(), recipe, seed=0)
    after = dict(network.named_parameters())
    for name, value in before.items():
        factor = 0.75 if value.ndim > 1 else 1.0
        torch.testing.assert_close(after[name].detach(), factor * value)


class Rounded(torch.nn.Module):
    """A teacher whose logits fit in the 16 bits that are stored."""

    def forward(self, images):
        return teacher()(images).half().float()


def test_stored_labels_teach_what_the_teacher_teaches():
    images, recipe = noise(9, 1, 8, 8), Recipe(epochs=4, batch_size=4)
    stored = label_views(
        lambda views: teacher()(views.images),
        images,
        recipe.views,
        batch_size=4,
        seed=5,
        num_epochs=2,
    )
    online, replayed = seeded(FlatHead, 1), seeded(FlatHead, 1)
    fit(online, images, towards_teachers([Rounded()], 1.0), recipe, seed=5, stored_epochs=2)
    fit(replayed, images, towards_stored(stored, 1.0), recipe, seed=5, stored_epochs=2)
    for one, other in zip(online.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_augmentation_comes_last():
    seen = []

    def blank(images):
        seen.append(tuple(images.shape))
        return images * 0

    network = seeded(FlatHead)
    images, labels = noise(5, 1, 8, 8), torch.arange(5) % 3
    fit(network, images, towards_classes(labels), plan(1), seed=0, augmentation=blank)
    assert seen == [(5, 1, 8, 8)]
    np.testing.assert_allclose(network.features[1].running_var.numpy(), 0.9, rtol=1e-6)


def test_a_diverging_training_names_epoch_and_rate():
    recipe = plan(3, optimiser="sgd", learning_rate=1e30)
    objective = towards_classes(torch.arange(6) % 3)
    with pytest.raises(DivergedError, match=r"epoch \d of 3: loss .*`learning_rate`"):
        fit(seeded(FlatHead), noise(6, 1, 8, 8), objective, recipe, seed=0)
