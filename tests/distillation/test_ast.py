import json

import pytest
import torch
from small_networks import VECTORS, relative_error, tensors

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.experts import expert_loss, resolved, train_expert
from stillhouse.distillation.matching import StepImages, SyntheticSet, matching_gradients
from stillhouse.distillation.methods.ast import (
    Ast,
    balance_factor,
    clip_factor,
    gradient_penalty,
    perturb,
)
from stillhouse.distillation.spec import ExpertSettings, Smoothing
from stillhouse.models.convnet import ConvNet

MODULE = ConvNet(num_channels=3, image_size=16, num_classes=4, depth=2, width=4)
NETWORK = FlatModule(MODULE)
EXPERT = tensors("dd_ast_01_expert_losses.npz")


def ast(**settings):
    return Ast(name="ast", images_per_class=1, **settings)


def options(**smoothing):
    return resolved(
        ExpertSettings(
            epochs=2,
            learning_rate=EXPERT["lr"].item(),
            momentum=EXPERT["momentum"].item(),
            weight_decay=EXPERT["weight_decay"].item(),
            smoothing=Smoothing(**smoothing),
        )
    )


@pytest.mark.parametrize(("name", "epoch", "penalty"), [("clip", 0, 0.0), ("clip_gp", 1, 2.0)])
def test_ramped_steps_reproduce_the_reference(name, epoch, penalty):
    """Both of the reference's steps lie in one epoch: 0 with factor 0.5, 1 with 0.55."""
    assert clip_factor(epoch) == pytest.approx(EXPERT[f"loss_decay_{name}"].item())
    settings = options(ramp_epochs=10, penalty_weight=penalty)
    draws = torch.Generator()
    loss_at = expert_loss(NETWORK, EXPERT["x"], EXPERT["y"], epoch, settings, (), draws)
    theta, velocity, losses = EXPERT["theta0"], torch.zeros(536), []
    for _ in range(2):
        point = theta.clone().requires_grad_()
        losses.append(loss_at(point))
        gradient = torch.autograd.grad(losses[-1], point)[0] + settings.weight_decay * theta
        velocity = settings.momentum * velocity + gradient
        theta = theta - settings.learning_rate * velocity
    assert relative_error(theta, EXPERT[f"theta_after_2_steps_{name}"]) < 1e-6
    mean = torch.stack(losses).mean().item()
    assert mean == pytest.approx(EXPERT[f"loss_avg_{name}"].item(), rel=1e-5)


def test_smooth_expert_reproduces_the_reference():
    torch.nn.utils.vector_to_parameters(EXPERT["theta0"], MODULE.parameters())
    settings, draws = options(penalty_weight=2.0), torch.Generator()
    first, last = train_expert(NETWORK, EXPERT["x"], EXPERT["y"], settings, (), draws)
    assert relative_error(last[0], EXPERT["theta_after_2_steps_gp"]) < 1e-6
    mean = (first[1] + last[1]) / 2
    assert mean == pytest.approx(EXPERT["loss_avg_gp"].item(), rel=1e-5)


def test_gradient_penalty_reproduces_the_reference():
    theta = EXPERT["theta0"].clone().requires_grad_()
    penalty = gradient_penalty(lambda images: NETWORK(theta, images), EXPERT["x"])
    (gradient,) = torch.autograd.grad(penalty, theta)
    assert penalty.item() == pytest.approx(EXPERT["gradient_penalty_lambda2"].item(), rel=1e-5)
    assert relative_error(gradient, EXPERT["penalty_grad_theta"]) < 1e-5


def test_clip_schedule_reproduces_the_reference():
    assert [clip_factor(e) for e in range(10)] == pytest.approx(EXPERT["clip_schedule"].tolist())
    assert clip_factor(10) == clip_factor(49) == 1
    assert [clip_factor(e, 4) for e in (0, 2, 4, 9)] == [0.5, 0.75, 1, 1]
    assert clip_factor(0, 0) == 1


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
