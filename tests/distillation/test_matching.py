"""Trajectory matching against reference vectors: MTT, TESLA, AST's student and DATM's labels."""

import json

import pytest
import torch
from small_networks import VECTORS, relative_error, tensors
from torch.nn.functional import cross_entropy

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.matching import Match, StepImages, SyntheticSet, matching_gradients
from stillhouse.distillation.methods.ast import (
    Ast,
    balance_factor,
    perturb,
)
from stillhouse.models.networks import ConvNet

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


def ast(**settings):
    return Ast(name="ast", images_per_class=1, **settings)


@pytest.mark.parametrize("last", [20, 15])
def test_balance_reproduces_the_reference(last):
    expected = json.loads((VECTORS / "dd_ast_03_balance_factor.json").read_text())[str(last)]
    assert [balance_factor(t, last) for t in range(last)] == pytest.approx(expected, rel=1e-12)


def test_student_reproduces_the_reference():
    vector = tensors("dd_ast_02_student_start3.npz")
    start = perturb(vector["expert"][0], NETWORK.shapes, vector["perturb_draws"])
    torch.testing.assert_close(start, vector["start_perturbed"], rtol=1e-5, atol=1e-7)
    student = ast(num_steps=vector["syn_steps"].item(), graded=False)
    matches = student.matches(vector["expert"][1:])
    assert [match.step for match in matches] == vector["match_steps"].tolist() == [2, 4, 7]
    synthetic = SyntheticSet(vector["x"], vector["y"], vector["syn_lr"])
    found, run = matching_gradients(
        NETWORK,
        synthetic,
        [StepImages(torch.arange(8))] * 7,
        start,
        matches,
        momentum=vector["momentum"].item(),
        loss_scale=balance_factor(vector["start_epoch"].item(), vector["max_start_epoch"].item()),
    )
    torch.testing.assert_close(run.losses.double(), vector["scaled_ce"], rtol=1e-5, atol=0)
    assert found.objective.item() == pytest.approx(vector["loss"].item(), rel=1e-5)
    terms = [found.terms[step].item() for step in (2, 4, 7)]
    assert terms == pytest.approx(
        [*vector["middle_losses"].tolist(), vector["final_loss"].item()], rel=1e-5
    )
    assert relative_error(run.states[-1], vector["theta_final"]) < 1e-5
    assert relative_error(found.leaves[0], vector["grad_x"]) < 1e-4
    assert found.learning_rate.item() == pytest.approx(vector["grad_lr"].item(), rel=1e-4)


def test_graded_matches_and_none_in_between():
    targets = [torch.zeros(1)] * 4
    graded = ast(num_steps=10, expert_epochs=4)
    found = [(match.step, match.weight) for match in graded.matches(targets)]
    assert found == [(2, 0.25), (4, 0.5), (6, 0.75), (10, 1.0)]
    assert [*graded.matched_epochs] == [1, 2, 3, 4]
    last = ast(num_steps=10, expert_epochs=4, intermediate=False)
    assert [*last.matched_epochs] == [4]
    assert [match.step for match in last.matches(targets[:1])] == [10]
