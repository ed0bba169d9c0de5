"""SRe2L against its reference, and what it recovers."""

import numpy as np
import pytest
import torch
from small_networks import PLAIN, FlatHead, noise, relative_error, seeded, teacher, tensors
from torch import nn

from stillhouse.distillation.methods.sre2l import (
    Sre2l,
    cosine_rate,
    image_norm,
    matching_loss,
    recover,
    recovery_batches,
    roll,
    total_variation,
)
from stillhouse.distillation.prepared import frozen, require_batch_norm
from stillhouse.distillation.preprocessing import Standardisation
from stillhouse.errors import DivergedError, ModelError

VECTOR = tensors("dd_infer_01_compensator_loss.npz")


def asked(**settings):
    return Sre2l(name="sre2l", images_per_class=1, **settings)


class Reference(nn.Module):
    """The network that the vector was made with."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.c2, self.b2 = nn.Conv2d(6, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        hidden = self.b1(self.c1(images)).relu()
        hidden = self.b2(self.c2(hidden)).relu()
        return self.fc(hidden.mean((2, 3)))


def reference():
    network = Reference()
    network.load_state_dict({k[3:]: v for k, v in VECTOR.items() if k.startswith("sd_")})
    return frozen(network)


def compensated(compensator):
    shift = VECTOR["jitter_shift"].tolist()
    return (VECTOR["base"] + compensator).roll(shift, dims=(2, 3))


def test_loss_and_gradient_reproduce_the_reference():
    compensator = VECTOR["compensator"].clone().requires_grad_()
    images, weight = compensated(compensator), VECTOR["r_bn"].item()
    loss = matching_loss(reference(), images, VECTOR["targets"], weight)
    torch.testing.assert_close(loss, VECTOR["loss"], rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, [compensator])
    assert relative_error(gradient, VECTOR["grad_compensator"]) < 1e-5
    alone = matching_loss(reference(), images, VECTOR["targets"], 0.0)
    torch.testing.assert_close(alone, VECTOR["ce"], rtol=1e-5, atol=1e-6)


def test_priors_reproduce_the_reference():
    images = compensated(VECTOR["compensator"])
    found, expected = total_variation(images), VECTOR["tv_l2"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(image_norm(images), VECTOR["l2_prior"], rtol=1e-5, atol=0)


def test_schedule_and_clipping_reproduce_the_reference():
    rates = [cosine_rate(0.25, step, 10) for step in range(10)]
    np.testing.assert_allclose(rates, VECTOR["cosine_lr_10_steps"], rtol=1e-12)
    cifar10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    cifar100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    for name, channels in (("clip_cifar10", cifar10), ("clip_cifar100", cifar100)):
        clipped = Standardisation(*channels).clip(VECTOR["clip_in"])
        torch.testing.assert_close(clipped, VECTOR[name], rtol=1e-5, atol=1e-6)


def test_the_loss_is_zero_statistics_where_the_batch_is_what_was_squeezed():
    images = noise(6, 1, 8, 8)
    network = seeded(FlatHead)
    layer = network.features[1]
    layer.momentum = 1.0
    network(images)
    layer.running_var *= 1 - 1 / (6 * 64)  # torch keeps the unbiased variance
    network.eval()

    def statistics(batch):
        labels = torch.zeros(len(batch), dtype=torch.int64)
        loss = matching_loss(network, batch, labels, 1.0)
        return loss - torch.nn.functional.cross_entropy(network(batch), labels)

    assert abs(statistics(images)) < 1e-4 and statistics(images[:3]) > 0.1


def test_a_teacher_without_batch_statistics_is_refused():
    with pytest.raises(ModelError, match=r"teachers\[1\] has no batch statistics.*norm: batch"):
        require_batch_norm(FlatHead(norm=False), "teachers[1]")
    require_batch_norm(FlatHead(), "teachers[0]")


def test_recovery_batches_go_through_the_classes_again_and_again():
    batches = recovery_batches(3, images_per_class=3, batch_size=4)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 0], [1, 2, 0, 1], [2]]


@pytest.mark.parametrize("more", [{}, {"min_scale": 0.5, "total_variation": 1e-3, "l2": 1e-3}])
def test_recovered_images_are_pixels_that_the_teacher_knows(more):
    settings = Sre2l(
        name="sre2l", images_per_class=1, iterations=40, statistics_weight=0.1, jitter=1, **more
    )
    labels = torch.tensor([0, 1, 2, 0])

    def run():
        return recover(teacher(), labels, (1, 8, 8), settings, PLAIN, rng=np.random.default_rng(3))

    images, losses = run()
    assert torch.equal(images, run()[0])
    assert len(losses) == 40 and losses[-1] < losses[0]
    pixels = PLAIN.pixels(images)
    assert images.shape == (4, 1, 8, 8) and pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    assert (teacher()(images).argmax(1) == labels).sum() >= 3


def test_a_recovery_that_diverges_names_the_settings():
    broken = teacher()
    broken.classifier.weight.data.fill_(torch.inf)
    settings, rng = asked(iterations=5), np.random.default_rng(0)
    with pytest.raises(DivergedError, match=r"iteration 1 of 5.*method.learning_rate"):
        recover(broken, torch.tensor([0, 1]), (1, 8, 8), settings, PLAIN, rng=rng)


def test_roll_moves_all_images_alike_and_loses_nothing():
    images = noise(3, 1, 5, 5)
    for seed in range(5):
        moved = roll(images, 2, np.random.default_rng(seed))
        shifts = [images.roll((y, x), dims=(2, 3)) for y in range(3) for x in range(3)]
        assert sum(torch.equal(moved, shifted) for shifted in shifts) == 1
    assert roll(images, 0, np.random.default_rng(0)) is images
