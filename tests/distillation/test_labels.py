import math

import pytest
import torch
from small_networks import FlatHead, noise, seeded, teacher, tensors, towards_teachers

from stillhouse.distillation.evaluate import (
    label_views,
    mean_logits,
    mixed_cross_entropy,
    soft_loss,
    towards_classes,
    towards_static,
    towards_stored,
)
from stillhouse.distillation.prepared import frozen
from stillhouse.distillation.recipes import ViewSettings
from stillhouse.distillation.views import Views, epoch_views, mixup

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


def test_static_labels_are_mixed_as_the_images_are():
    labels = torch.tensor([[4.0, 0.0], [0.0, 8.0], [2.0, 2.0]])
    matching = torch.tensor([[1.0, 6.0], [2.0, 2.0]])
    objective = towards_static(labels.half(), 1.0)
    assert objective(matching, view([1, 2], [0, 2], 0.75)).item() == pytest.approx(0, abs=1e-6)
    assert objective(matching, view([0, 2], [1, 2], 0.75)).item() > 1


def test_stored_labels_are_what_the_teacher_says_of_the_same_views():
    images, settings = noise(5, 1, 8, 8), ViewSettings(mix="cutmix")
    teachers = [teacher(0), teacher(1)]
    stored = label_views(
        lambda views: mean_logits(teachers, views.images),
        images,
        settings,
        batch_size=2,
        seed=7,
        num_epochs=3,
    )
    assert stored.shape == (3, 5, 3) and stored.dtype == torch.float16
    online = towards_teachers(teachers, 2.0)
    student = seeded(FlatHead, 5).eval()
    for epoch in (2, 0):
        for views in epoch_views(images, settings, batch_size=2, seed=7, epoch=epoch):
            torch.testing.assert_close(
                stored[epoch, views.span].float(),
                mean_logits(teachers, views.images),
                rtol=1e-3,
                atol=1e-3,
            )
            logits = student(views.images)
            torch.testing.assert_close(
                towards_stored(stored, 2.0)(logits, views),
                online(logits, views),
                rtol=2e-2,
                atol=1e-3,
            )


def test_a_frozen_network_has_no_gradients_and_does_not_move():
    network = frozen(seeded(FlatHead))
    before = network.features[1].running_mean.clone()
    assert not network(noise(4, 1, 8, 8)).requires_grad
    assert torch.equal(before, network.features[1].running_mean)
