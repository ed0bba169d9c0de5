import torch
from trajectory_vectors import load

from stillhouse.distillation.prepared import fit_zca

VECTOR = load("dd_mtt_04_zca.npz")


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


def test_whitened_images_have_no_correlations():
    images = torch.rand(500, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    images[:, :, 1] += images[:, :, 0]
    rows = fit_zca(images, eps=0.0).apply(images).flatten(1)
    torch.testing.assert_close(rows.T @ rows / 499, torch.eye(9).double(), rtol=0, atol=1e-10)
