"""DSA and views: against reference vectors, by hand, and drawn again from their seed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import noise, tensors

from stillhouse.distillation import augment as dsa
from stillhouse.distillation.augment import (
    augment,
    cutmix,
    cutmix_box,
    draw_augmentation,
    epoch_views,
    padded_crop,
    resized_crop,
    shuffle_patches,
)
from stillhouse.distillation.recipes import DSA_GROUPS, ViewSettings

VECTOR = tensors("dd_mtt_03_dsa_ops.npz")
DRAWS = {
    "brightness": "brightness",
    "saturation": "saturation",
    "contrast": "contrast",
    "flip": "flip",
    "rotate": "rotate_theta_rad",
    "scale": "scale_sx_sy",
    "crop": "crop_dx_dy",
    "cutout": "cutout_ox_oy",
}


@pytest.mark.parametrize("name", DRAWS)
def test_operator_reproduces_the_reference(name):
    values = VECTOR[f"draw_{DRAWS[name]}"]
    found = getattr(dsa, name)(VECTOR["x"], *(values if values.ndim == 2 else [values]))
    torch.testing.assert_close(found, VECTOR[f"out_{name}"], rtol=1e-5, atol=1e-6)


def draw(group, seed, batch_size=400, image_size=8):
    generator = torch.Generator().manual_seed(seed)
    return draw_augmentation((group,), batch_size, image_size, generator)


@pytest.mark.parametrize(
    ("group", "count", "low", "high"),
    [
        ("color", 3, 0, 1),
        ("crop", 2, -1, 1),
        ("cutout", 2, 0, 8),
        ("flip", 1, 0, 1),
        ("scale", 2, 1 / 1.2, 1.2),
        ("rotate", 1, -0.261799, 0.2618),
    ],
)
def test_draws_fill_their_range(group, count, low, high):
    values = draw(group, 0).values.double()
    assert values.shape == (count, 400)
    assert low <= values.min() < low + 0.03 * (high - low)
    assert high - 0.03 * (high - low) < values.max() <= high


def test_every_group_is_drawn():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_augmentation(DSA_GROUPS, 1, 8, generator).group for _ in range(100)]
    assert set(drawn) == set(DSA_GROUPS)


@pytest.mark.parametrize("group", DSA_GROUPS)
def test_augmentation_is_the_same_in_parts(group):
    images, drawn = VECTOR["x"], draw(group, 1, batch_size=3)
    whole = augment(images, drawn)
    assert whole.shape == images.shape and not torch.equal(whole, images)
    shares = (slice(0, 0), slice(0, 1), slice(1, 3))  # one worker without rows
    parts = [augment(images[rows], drawn.part(rows)) for rows in shares]
    assert torch.equal(torch.cat(parts), whole)


def test_color_is_brightness_then_saturation_then_contrast():
    drawn = draw("color", 2, batch_size=3)
    expected = dsa.brightness(VECTOR["x"], drawn.values[0])
    expected = dsa.contrast(dsa.saturation(expected, drawn.values[1]), drawn.values[2])
    assert torch.equal(augment(VECTOR["x"], drawn), expected)


@pytest.mark.parametrize("group", DSA_GROUPS)
def test_operators_are_differentiable(group):
    images = VECTOR["x"].double()[:, :, :4, :4].requires_grad_()
    drawn = draw(group, 3, batch_size=3, image_size=4)
    assert torch.autograd.gradcheck(lambda x: augment(x, drawn), images)


CUTMIX = tensors("dd_sre2l_01_cutmix.npz")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_cutmix_reproduces_the_reference(case):
    cx, cy, *expected = CUTMIX["cx_cy_box"][case].tolist()
    box = cutmix_box((8, 8), CUTMIX["lam"][case].item(), (cx, cy))
    assert [*box] == expected
    before = CUTMIX["images"].clone()
    mixed = cutmix(CUTMIX["images"], CUTMIX["perm"], box)
    torch.testing.assert_close(mixed, CUTMIX["out"][case], rtol=0, atol=0)
    assert torch.equal(before, CUTMIX["images"])  # the reference edits its input


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.floats(0, 1), st.data())
def test_a_box_lies_in_the_image_and_is_no_larger_than_drawn(size, weight, data):
    centre = tuple(data.draw(st.integers(0, side - 1)) for side in size)
    top, left, bottom, right = cutmix_box(size, weight, centre)
    assert 0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]
    assert (bottom - top) * (right - left) <= (1 - weight) * size[0] * size[1] + 1e-6


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_views_are_drawn_again_from_their_seed(mix, crop):
    settings = ViewSettings(mix=mix, crop=crop, patches=2)
    images = noise(7, 2, 6, 6)

    def draw(**changes):
        arguments = {"batch_size": 3, "seed": 1, "epoch": 4} | changes
        return list(epoch_views(images, settings, **arguments))

    first, again = draw(), draw()
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.images, other.images) and one.weight == other.weight
        assert torch.equal(one.rows, other.rows) and torch.equal(one.partners, other.partners)
    assert sorted(torch.cat([view.rows for view in first]).tolist()) == list(range(7))
    assert [(view.start, len(view.rows), view.epoch) for view in first] == [
        (0, 3, 4),
        (3, 3, 4),
        (6, 1, 4),
    ]
    assert all(view.images.shape == (len(view.rows), 2, 6, 6) for view in first)
    assert not torch.equal(first[0].images, draw(seed=2)[0].images)
    assert not torch.equal(first[0].images, draw(epoch=5)[0].images)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_view_is_its_image_and_partner_in_the_stated_shares(mix):
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 8, 8)
    settings = ViewSettings(mix=mix, crop="none", flip=False)
    for epoch in range(10):
        for view in epoch_views(images, settings, batch_size=5, seed=0, epoch=epoch):
            expected = view.weight * view.rows + (1 - view.weight) * view.partners
            torch.testing.assert_close(view.images.mean((1, 2, 3)), expected.float())


def test_padded_crop_moves_by_at_most_an_eighth_and_brings_zeros():
    moved = padded_crop(torch.ones(200, 1, 16, 16), np.random.default_rng(0))
    kept = moved.sum((1, 2, 3))
    assert kept.min() == 14 * 14 and kept.max() == 16 * 16


def test_resized_crop_of_a_ramp_is_a_part_of_it_enlarged():
    ramp = torch.linspace(0, 1, 16).expand(300, 1, 16, 16)
    crops = resized_crop(ramp, 0.25, np.random.default_rng(0))
    spread = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))
    assert 0.3 < spread.min() < 0.5 and spread.max() > 0.95
    assert torch.all(crops[..., 1:] >= crops[..., :-1] - 1e-6)
    flat = resized_crop(torch.full((3, 1, 5, 5), 2.0), 0.1, np.random.default_rng(0))
    torch.testing.assert_close(flat, torch.full((3, 1, 5, 5), 2.0))


@pytest.mark.parametrize("side", [6, 7])
def test_shuffling_patches_keeps_every_pixel_once(side):
    images = torch.arange(4.0 * side * side).view(4, 1, side, side)
    shuffled = shuffle_patches(images, 3, np.random.default_rng(0))
    assert torch.equal(shuffled.flatten(1).sort().values, images.flatten(1))
    tile = shuffled[0, 0, :2, :2]
    if side == 6:
        assert (tile - tile[0, 0]).tolist() == [[0, 1], [6, 7]]
