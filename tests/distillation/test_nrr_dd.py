"""NRR-DD against a reference made from its description, and by hand."""

import numpy as np
import pytest
import torch
from small_networks import PLAIN, FlatHead, MeanHead, noise, seeded, teacher, tensors

from stillhouse.distillation.augment import Views, epoch_views
from stillhouse.distillation.evaluate import label_views, mean_logits
from stillhouse.distillation.methods.nrr_dd import (
    NrrDd,
    activation_map,
    cover,
    critical_patches,
    distances,
    doubt_score,
    pinned_down,
    refine,
    relevance,
    towards_distances,
)
from stillhouse.distillation.prepared import frozen
from stillhouse.distillation.recipes import ViewSettings
from stillhouse.errors import DivergedError
from stillhouse.models.networks import ConvNet, ResNet18

VECTOR = tensors("dd_nrr_01_from_description.npz")


def asked(**settings):
    return NrrDd(name="nrr_dd", images_per_class=1, **settings)


VIEWS = Views(torch.empty(0), torch.arange(6), VECTOR["perm"], VECTOR["lam"].item(), 0, 0)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_distances_reproduce_the_description(who):
    found = distances(VECTOR[f"{who}_logits"], VECTOR["y"], VIEWS)
    expected = torch.stack([VECTOR[f"d_{who}_org"], VECTOR[f"d_{who}_aug"]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


NETWORKS = {
    "flat": (FlatHead, 8, 4),
    "mean": (MeanHead, 8, 4),
    "convnet": (
        lambda: ConvNet(
            num_channels=1, image_size=12, num_classes=3, depth=2, width=4, norm="batch"
        ),
        12,
        4,
    ),
    "resnet18": (lambda: ResNet18(num_channels=1, num_classes=3, width=2), 16, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_relevance_parts_the_logit_among_the_places(name):
    make, side, places_side = NETWORKS[name]
    network = frozen(seeded(make))
    images, labels = noise(4, 1, side, side), torch.tensor([0, 1, 2, 1])
    places = relevance(network, images, labels)
    assert places.shape == (4, places_side, places_side)
    logits = network(images) - network.classifier.bias
    torch.testing.assert_close(places.sum((1, 2)), logits.gather(1, labels[:, None])[:, 0])


def test_the_map_is_strong_where_the_class_is():
    network = teacher()
    network.classifier.weight.data.zero_()
    network.classifier.weight.data.view(3, 4, 4, 4)[1, :, 0, 3] = 1  # class 1 looks top right
    found = activation_map(network, noise(2, 1, 8, 8) + 3, torch.tensor([1, 0]))
    assert found.shape == (2, 8, 8)
    assert found[0, :2, 6:].min() > 0.5 and found[0, 4:].max() == 0 and found[0].max() == 1
    assert found[1].max() == 0


def test_cover_is_the_share_of_the_map_in_a_box():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 1, 3
    boxes = torch.tensor([[[0, 0, 2], [2, 2, 2], [0, 0, 4]], [[0, 0, 4], [1, 1, 1], [0, 0, 1]]])
    assert cover(maps, boxes).tolist() == [[0.25, 0.75, 1.0], [0.0, 0.0, 0.0]]


def test_patches_are_the_ones_the_teacher_is_least_sure_of():
    labels, images = torch.tensor([0, 1] * 8), noise(16, 1, 8, 8)
    own = images[labels == 1]
    half_right = teacher()
    logits = half_right(own)
    half_right.classifier.bias.data[1] += (logits.amax(1) - logits[:, 1]).median() + 0.01
    settings = asked(num_crops=1, min_scale=1.0)
    rng = np.random.default_rng(0)
    chosen = critical_patches(half_right, images, labels, 1, 3, settings, rng)
    log_probs = half_right(own).log_softmax(1)
    right = log_probs.argmax(1) == 1
    assert 0 < right.sum() < 8
    expected = own[right][log_probs[right, 1].argsort()][:3]
    assert torch.equal(chosen[: len(expected)], expected)


def test_least_sure_first_and_wrong_ones_last_by_hand():
    log_probs = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1]])
    scores = doubt_score(log_probs.log(), 1)
    assert scores.argsort().tolist() == [1, 2, 0, 3]


def test_critical_pixels_never_move_and_the_loss_falls():
    images, labels = PLAIN.clip(noise(5, 1, 8, 8)), torch.tensor([0, 1, 2, 0, 1])
    settings = asked(iterations=30, learning_rate=0.2, statistics_weight=0.05)
    refined, losses = refine(teacher(), images, labels, settings, PLAIN)
    critical = activation_map(teacher(), images, labels)[:, None] >= settings.epsilon
    assert 0 < critical.float().mean() < 1
    assert torch.equal(refined[critical], images[critical])
    moved = (refined != images)[~critical].float().mean()
    assert moved > 0.5 and losses[-1] < losses[0]
    pixels = PLAIN.pixels(refined)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    again, _ = refine(teacher(), images, labels, settings, PLAIN)
    assert torch.equal(refined, again)


def test_a_refinement_that_diverges_names_the_settings():
    broken = teacher()
    broken.features[1].running_var.fill_(torch.inf)
    with pytest.raises(DivergedError, match=r"step 1 of 200.*method.learning_rate"):
        refine(broken, noise(2, 1, 8, 8), torch.tensor([0, 1]), asked(), PLAIN)


@pytest.mark.parametrize("form", ["absolute", "divergence"])
def test_stored_distances_are_the_teachers_on_the_same_views(form):
    images, labels = noise(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    settings, teachers = ViewSettings(mix="cutmix"), [teacher(0), teacher(1)]
    dbr = asked()
    stored = label_views(
        lambda views: dbr.answer(teachers, labels, views),
        images,
        settings,
        batch_size=2,
        seed=3,
        num_epochs=2,
    )
    assert stored.shape == (2, 5, 2) and stored.dtype == torch.float16
    for views in epoch_views(images, settings, batch_size=2, seed=3, epoch=1):
        logits = mean_logits(teachers, views.images)
        expected = distances(logits, labels, views)
        torch.testing.assert_close(stored[1, views.span].float(), expected, rtol=1e-3, atol=1e-3)
        settings_of = asked(class_weight=1.0, deviation_weight=10.0, deviation=form)
        loss = towards_distances(labels, stored, settings_of)(logits, views)
        assert loss.item() == pytest.approx(expected[:, 1].mean().item(), abs=0.02)


def test_deviation_from_the_stored_distances_by_hand():
    logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([0, 1])
    views = Views(torch.empty(0), torch.tensor([0]), torch.tensor([1]), 0.5, 1, 0)
    half = torch.tensor(2.0).log().item()
    stored = torch.zeros(2, 2, 2)
    stored[1, 0] = torch.tensor([half - 0.5, half + 0.25])
    settings = asked(class_weight=1.0, deviation_weight=2.0, deviation="absolute")
    loss = towards_distances(labels, stored, settings)(logits, views)
    assert loss.item() == pytest.approx(half + 2 * (0.5 + 0.25) / 2)


def test_divergence_of_class_partner_and_others_by_hand():
    labels = torch.tensor([0, 1, 2, 3])
    views = Views(torch.empty(0), torch.tensor([0]), torch.tensor([1]), 0.6, 0, 0)
    teacher, student = [0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.3, 0.1]
    stored = distances(torch.tensor([teacher]).log(), labels, views)[None]
    loss = towards_distances(labels, stored, asked())(torch.tensor([student]).log(), views)
    expected = 0.5 * np.log(0.5 / 0.2) + 0.3 * np.log(0.3 / 0.4) + 0.2 * np.log(0.2 / 0.4)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("weight", "partner"), [(0.6, 0), (1.0, 1)], ids=["same class", "unmixed"])
def test_where_one_probability_is_pinned_down_the_rest_is_others(weight, partner):
    labels = torch.tensor([0, 1])
    views = Views(torch.empty(0), torch.tensor([0]), torch.tensor([partner]), weight, 0, 0)
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log().requires_grad_()
    found = pinned_down(distances(logits, labels, views), labels, views)
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.0, 0.3]]))
    (gradient,) = torch.autograd.grad(found[0, 2], logits)
    assert torch.isfinite(gradient).all()
