import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from vector_cases import VECTORS

from stillhouse.errors import ModelError
from stillhouse.models.device import initialised
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.models.networks import ConvNet, ResNet18, build_network


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def relative_error(found, expected):
    expected = torch.as_tensor(expected)
    return float((found - expected).norm() / expected.norm())


def test_convnet_reproduces_the_reference():
    vector = np.load(VECTORS / "dd_mtt_01_convnet_gray28.npz")
    network = ConvNet(num_channels=1, image_size=28, num_classes=10, depth=3, width=8)
    named = dict(network.named_parameters())
    assert list(named) == vector["param_names"].tolist()
    assert [str(tuple(value.shape)) for value in named.values()] == vector["param_shapes"].tolist()
    torch.nn.utils.vector_to_parameters(torch.tensor(vector["flat_params"]), named.values())
    images = torch.tensor(vector["x"], requires_grad=True)
    logits = network(images)
    loss = cross_entropy(logits, torch.tensor(vector["y"]))
    image_gradient, *gradients = torch.autograd.grad(loss, [images, *named.values()])
    np.testing.assert_allclose(logits.detach(), vector["logits"], rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx(float(vector["ce_loss"]), rel=1e-5)
    assert relative_error(image_gradient, vector["grad_x"]) < 1e-5
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    assert relative_error(flat, vector["grad_flat"]) < 1e-5


@pytest.mark.parametrize(
    ("channels", "size", "classes", "expected"),
    [(3, 32, 10, 320_010), (3, 32, 100, 504_420), (1, 28, 10, 317_706)],
)
def test_published_numbers_of_parameters(channels, size, classes, expected):
    assert count(ConvNet(num_channels=channels, image_size=size, num_classes=classes)) == expected
    assert count(ResNet18(num_channels=3, num_classes=10)) == 11_173_962


@pytest.mark.parametrize(("norm", "expected"), [("instance", 16), ("batch", 16), ("none", 0)])
def test_norms(norm, expected):
    """A scale and a shift per channel; ResNet-18 halves the image three times with any of them."""
    network = ConvNet(num_channels=3, image_size=8, num_classes=2, depth=1, width=8, norm=norm)
    assert count(network) == 8 * 27 + 8 + expected + (8 * 16 + 1) * 2
    assert network(torch.zeros(5, 3, 8, 8)).shape == (5, 2)
    network = ResNet18(num_channels=1, num_classes=4, width=2, norm=norm)
    images = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    assert network.features(images).shape == (2, 16, 3, 3)
    assert network(images).shape == (2, 4)


def test_images_too_small_for_the_depth_are_refused():
    with pytest.raises(ModelError, match=r"images of 4 pixels .* `depth`"):
        ConvNet(num_channels=3, image_size=4, num_classes=2, depth=3)


def dropping(num_channels, image_size, num_classes, p=0.0):
    layers = [nn.Flatten(), nn.Dropout(p), nn.Linear(num_channels * image_size**2, num_classes)]
    return nn.Sequential(*layers)


def failing(num_channels, image_size, num_classes):
    raise KeyError("no such size")


def test_factories(tmp_path, monkeypatch):
    (tmp_path / "h7_broken.py").write_text("size = {}['none']")
    (tmp_path / "h7_worse.py").write_text("def make(:")
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(factory, **options):
        settings = NetworkSettings(name="factory", factory=factory, options=options)
        return build_network(settings, (1, 8, 8), 10, 0)

    assert build(f"{__name__}:dropping", p=0.5)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    for factory, message in {
        f"{__name__}:failing": "failing` raised KeyError: 'no such size'",
        f"{__name__}:nowhere": r"nowhere` cannot be imported .*PYTHONPATH",
        "h7_broken:make": r"`factory: h7_broken:make` cannot .*KeyError",
        "h7_worse:make": r"`factory: h7_worse:make` cannot .*SyntaxError",
        "h7_no:make": r"`factory: h7_no:make` cannot .*h7_no",
    }.items():
        with pytest.raises(ModelError, match=message) as caught:
            build(factory)
        assert "\n" not in str(caught.value)


def test_weights_depend_on_the_seed_alone():
    def make():
        return ResNet18(num_channels=1, num_classes=2, width=2)

    before = torch.random.get_rng_state()
    first, again, other = (initialised(make, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
