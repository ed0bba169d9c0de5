import pytest
import torch
from small_networks import tensors

from stillhouse.distillation import augment as dsa
from stillhouse.distillation.augment import augment, draw_augmentation
from stillhouse.distillation.recipes import DSA_GROUPS

VECTOR = tensors("dd_mtt_03_dsa_ops.npz")
DRAWS = {
    "brightness": ["brightness"],
    "saturation": ["saturation"],
    "contrast": ["contrast"],
    "flip": ["flip"],
    "rotate": ["rotate_theta_rad"],
    "scale": ["scale_sx_sy"],
    "crop": ["crop_dx_dy"],
    "cutout": ["cutout_ox_oy"],
}


@pytest.mark.parametrize("name", DRAWS)
def test_operator_reproduces_the_reference(name):
    values = VECTOR[f"draw_{DRAWS[name][0]}"]
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
    parts = [augment(images[rows], drawn.part(rows)) for rows in (slice(0, 1), slice(1, 3))]
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
