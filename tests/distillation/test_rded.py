"""RDED against its reference, and by hand."""

import numpy as np
import pytest
import torch
from small_networks import noise, teacher, tensors
from torch import nn

from stillhouse.distillation.methods.rded import (
    PatchSettings,
    draw_crops,
    patch_log_probs,
    select_patches,
    stitch,
    sure_patches,
)
from stillhouse.errors import InputError

VECTOR = tensors("dd_rded_01_select_and_stitch.npz")


class Flat(nn.Module):
    def forward(self, images):
        return images.flatten(1) @ VECTOR["scorer_weight"]


def test_select_and_stitch_reproduce_the_reference():
    crops = VECTOR["crops"]
    scores = -patch_log_probs(Flat(), crops, 8)[..., VECTOR["label"].item()]
    torch.testing.assert_close(scores, VECTOR["scores"].T, rtol=1e-5, atol=1e-5)
    assert scores.argmin(1).tolist() == VECTOR["best_crop"].tolist()
    assert scores.amin(1).argsort()[:4].tolist() == VECTOR["order"].tolist()
    chosen = select_patches(crops, scores, 4)
    assert torch.equal(chosen, VECTOR["selected"])
    assert torch.equal(stitch(chosen, 2, 8), VECTOR["stitched"])


def test_stitching_several_images_and_an_odd_side():
    patches = torch.arange(8.0)[:, None, None, None].expand(8, 1, 3, 3)
    images = stitch(patches, 2, 7)
    assert images.shape == (2, 1, 7, 7)
    assert images[0, 0, 0].tolist() == [0] * 4 + [2] * 3
    assert images[1, 0, :, 6].tolist() == [3] * 4 + [7] * 3
    assert stitch(patches, 1, 3) is patches


@pytest.mark.parametrize("factor", [1, 2])
def test_crops_are_parts_of_their_images(factor):
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(20, 1, 1, 1)
    settings = PatchSettings(factor=factor, num_crops=6, min_scale=0.1)
    patches, boxes = draw_crops(images, settings, np.random.default_rng(0))
    side = 8 // factor
    assert patches.shape == (20, 6, 1, side, side)
    top, left, length = boxes.unbind(-1)
    assert torch.all((top >= 0) & (left >= 0) & (length >= 1))
    assert torch.all((top + length <= 8) & (left + length <= 8))
    centre = (top + (length - 1) / 2) * 8 + left + (length - 1) / 2
    torch.testing.assert_close(patches.mean((2, 3, 4)), centre, rtol=0, atol=0.5)
    assert len(set(length.flatten().tolist())) > 3


def test_a_class_is_made_of_its_own_images_the_surest_first():
    labels = torch.tensor([0, 1] * 8)
    images = noise(16, 1, 8, 8)
    settings = PatchSettings(num_crops=1, min_scale=1.0)

    def run(count):
        rng = np.random.default_rng(0)
        return sure_patches(teacher(), images, labels, 1, count, settings, rng)

    own = images[labels == 1]
    losses = -teacher()(own).log_softmax(1)[:, 1]
    assert torch.equal(run(3), own[losses.argsort()[:3]])
    with pytest.raises(InputError, match="class 1 has 8 training images, 9 patches"):
        run(9)
