import pytest
import torch
from small_networks import relative_error, tensors
from torch.nn.functional import cross_entropy

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.matching import Match, StepImages, SyntheticSet, matching_gradients
from stillhouse.models.convnet import ConvNet

NETWORK = FlatModule(ConvNet(num_channels=3, image_size=16, num_classes=4, depth=2, width=4))


def match(vector, order, **options):
    synthetic = SyntheticSet(vector["x"], vector["y"], vector["syn_lr"])
    batches = [StepImages(rows) for rows in order]
    matches = [Match(len(batches), vector["theta_target"])]
    return matching_gradients(NETWORK, synthetic, batches, vector["theta0"], matches, **options)


@pytest.mark.parametrize("name", ["n1", "n4_batch4"])
def test_mtt_reproduces_the_reference(name):
    vector = tensors(f"dd_mtt_02_trajectory_match_{name}.npz")
    found, run = match(vector, vector["order"])
    torch.testing.assert_close(run.losses.double(), vector["ce"], rtol=1e-5, atol=0)
    assert relative_error(run.states[-1], vector["theta_final"]) < 1e-5
    assert found.objective.item() == pytest.approx(vector["loss"].item(), rel=1e-5)
    assert relative_error(found.leaves[0], vector["grad_x"]) < 1e-4
    assert found.learning_rate.item() == pytest.approx(vector["grad_lr"].item(), rel=1e-4)


def test_tesla_is_twice_what_its_release_applies():
    vector = tensors("dd_tesla_01_grad_n1.npz")
    order = torch.arange(8)[None]
    (found, _), (exact, _) = match(vector, order, first_order=True), match(vector, order)
    assert found.objective.item() == pytest.approx(vector["loss_tesla"].item(), rel=1e-5)
    assert relative_error(found.leaves[0] / 2, vector["grad_x_released"]) < 1e-5
    assert relative_error(exact.leaves[0], vector["grad_x_exact"]) < 1e-5
    assert found.learning_rate.item() == pytest.approx(vector["grad_lr_released"].item(), rel=1e-5)
    assert exact.learning_rate.item() == pytest.approx(vector["grad_lr_exact"].item(), rel=1e-5)


def test_tesla_is_the_published_terms_at_four_steps():
    """2/D d[(eta (theta* - theta_0) + eta^2 G) . g_n]/dx with every theta_n held, G = sum g_n."""
    vector = tensors("dd_mtt_02_trajectory_match_n4_batch4.npz")
    found, run = match(vector, vector["order"], first_order=True)
    start, target, eta = (vector[name] for name in ("theta0", "theta_target", "syn_lr"))
    images = vector["x"].clone().requires_grad_()
    gradients = []
    for theta, rows in zip(run.states, vector["order"], strict=False):
        point = theta.clone().requires_grad_()
        loss = cross_entropy(NETWORK(point, images[rows]), vector["y"][rows])
        gradients.append(torch.autograd.grad(loss, point, create_graph=True)[0])
    total, scale = sum(gradients).detach(), 2 / (start - target).square().sum()
    inner = sum((eta * (target - start) + eta**2 * total) @ g for g in gradients)
    (expected,) = torch.autograd.grad(scale * inner, images)
    assert relative_error(found.leaves[0], expected) < 1e-5
    of_eta = scale * (start - target - eta * total) @ -total
    assert found.learning_rate.item() == pytest.approx(of_eta.item(), rel=1e-5)
    assert relative_error(match(vector, vector["order"])[0].leaves[0], expected) > 1e-3
