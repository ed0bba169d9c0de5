"""Experts: how they are trained, against AST's reference and by hand, and stored trajectories."""

import pytest
import torch
from small_networks import relative_error, tensors

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.experts import (
    Trajectory,
    encode_trajectory,
    expert_loss,
    resolved,
    train_expert,
)
from stillhouse.distillation.methods.ast import (
    clip_factor,
    gradient_penalty,
)
from stillhouse.distillation.methods.ftd import gsam_direction
from stillhouse.distillation.spec import ExpertSettings, Smoothing
from stillhouse.errors import ArtifactError
from stillhouse.models.networks import ConvNet

MODULE = ConvNet(num_channels=3, image_size=16, num_classes=4, depth=2, width=4)
NETWORK = FlatModule(MODULE)
EXPERT = tensors("dd_ast_01_expert_losses.npz")


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


CURVATURE = torch.tensor([2.0, 8.0])


def gradient_at(theta):
    return CURVATURE * theta


def test_gsam_step_by_hand():
    """g = (3, 4), |theta| g = (4.5, 2), theta^2 g = (6.75, 1)."""
    theta = torch.tensor([1.5, 0.5])
    step = torch.tensor([6.75, 1.0]) / (4.5**2 + 2**2) ** 0.5
    worst = CURVATURE * (theta + step)
    found = gsam_direction(gradient_at, theta, rho=1.0, alpha=0.0)
    torch.testing.assert_close(found, worst)
    found = gsam_direction(gradient_at, theta, rho=1.0, alpha=0.5)
    g = torch.tensor([3.0, 4.0])
    along = (g @ worst) / (worst @ worst) * worst
    torch.testing.assert_close(found, worst - 0.5 * (g - along))


def network(width=2, norm="instance"):
    shape = {"num_channels": 1, "image_size": 8, "num_classes": 2, "depth": 1}
    return FlatModule(ConvNet(**shape, width=width, norm=norm))


def snapshots():
    generator = torch.Generator().manual_seed(0)
    return {
        epoch: torch.randn(network().num_parameters, generator=generator) for epoch in (0, 2, 3)
    }


def written(folder, dtype="float32"):
    path = folder / "expert.safetensors"
    path.write_bytes(encode_trajectory(network(), snapshots(), dtype))
    return path


def test_snapshots_come_back(tmp_path):
    found = Trajectory(written(tmp_path), network())
    assert found.epochs == (0, 2, 3)
    for epoch, expected in snapshots().items():
        assert torch.equal(found.snapshot(epoch), expected)


def test_bfloat16_takes_half_the_bytes_and_rounds(tmp_path):
    path = written(tmp_path, "bfloat16")
    found = Trajectory(path, network())
    assert 0 <= path.stat().st_size - 3 * 2 * network().num_parameters < 1000
    expected = snapshots()[2]
    assert torch.equal(found.snapshot(2), expected.bfloat16().float())
    torch.testing.assert_close(found.snapshot(2), expected, rtol=1 / 256, atol=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(width=3), r"features.0.weight is \(2, 1, 3, 3\) there and \(3, 1, 3, 3\) in"),
        (network(norm="none"), r"features.1.weight is \(2,\) there and absent in `network`"),
    ],
)
def test_another_network_is_refused(tmp_path, other, message):
    with pytest.raises(ArtifactError, match=message):
        Trajectory(written(tmp_path), other)


def test_an_epoch_that_is_not_stored_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds epochs 0, 2 to 3, not 1: .*`experts.epochs`"):
        Trajectory(written(tmp_path), network()).snapshot(1)


@pytest.mark.parametrize("keep", [0, 10, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="no expert's trajectory, or cut short"):
        Trajectory(path, network())


def test_a_changed_byte_is_noticed_in_its_snapshot(tmp_path):
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = Trajectory(path, network())
    assert torch.equal(found.snapshot(2), snapshots()[2])
    with pytest.raises(ArtifactError, match="the checksum of epoch 3 is wrong"):
        found.snapshot(3)


def test_what_holds_an_expert_back_is_by_kind_or_as_set():
    def held(kind, **changes):
        found = resolved(ExpertSettings.model_validate(changes), kind)
        smoothing = found.smoothing
        return (
            smoothing.ramp_epochs,
            smoothing.penalty_weight,
            smoothing.rho,
            found.drop_factor,
            found.drop_epoch,
        )

    assert held("smooth") == (10, 2.0, None, 0.6, 26)
    assert held("plain") == (0, 0.0, None, 0.1, None)
    assert held("flat") == (0, 0.0, 0.01, 0.1, None)
    changed = {"smoothing": {"ramp_epochs": 0, "penalty_weight": 0.5}, "drop_factor": 0.3}
    assert held("smooth", **changed) == (0, 0.5, None, 0.3, 26)
    assert held("smooth", smoothing={"kind": "flat"}) == held("flat")
