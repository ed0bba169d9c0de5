"""Standardisation and ZCA: pixels to the input of networks, and back."""

import numpy as np
import torch
from small_networks import tensors

from stillhouse.distillation.images import image_set
from stillhouse.distillation.preprocessing import Standardisation, fit_standardisation, fit_zca


def test_statistics_by_hand_of_each_channel():
    pixels = np.zeros((2, 3, 1, 1), np.uint8)
    pixels[1, 0], pixels[:, 2] = 255, 51
    expected = Standardisation((0.5, 0.0, 0.2), (0.5, 1 / 255, 1 / 255))
    found = fit_standardisation(image_set(pixels, [0, 1]))
    np.testing.assert_allclose(found.mean, expected.mean)
    np.testing.assert_allclose(found.std, expected.std)


def test_bytes_survive_the_way_there_and_back():
    standardisation = Standardisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(
        standardisation.to_bytes(standardisation.apply(pixels.float() / 255)), pixels
    )
    outside = torch.full((1, 3, 2, 2), 9.0)
    assert torch.all(standardisation.to_bytes(outside) == 255)
    clipped = standardisation.clip(torch.cat([outside, -outside]))
    torch.testing.assert_close(
        standardisation.pixels(clipped),
        torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2),
    )


VECTOR = tensors("dd_mtt_04_zca.npz")


def test_zca_reproduces_the_reference():
    zca = fit_zca(VECTOR["train"], VECTOR["eps"].item())
    torch.testing.assert_close(zca.mean[None], VECTOR["mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(zca.matrix, VECTOR["transform"], rtol=1e-5, atol=1e-5)
    for part in ("train", "test"):
        found = zca.apply(VECTOR[part])
        torch.testing.assert_close(found, VECTOR[f"{part}_out"], rtol=1e-5, atol=1e-5)
    restored = zca.pixels(zca.apply(VECTOR["test"]))
    torch.testing.assert_close(restored, VECTOR["test"], rtol=0, atol=1e-5)
    torch.testing.assert_close(restored, VECTOR["test_back"], rtol=0, atol=1e-5)
