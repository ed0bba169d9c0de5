"""Losses between a student and its teachers, against numbers of the references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from vector_cases import cases, check, double

from stillhouse.training.objectives import (
    dhkd,
    distil,
    layer_losses,
    lsskd,
    self_distillation,
)


@pytest.mark.parametrize(("given", "wanted"), cases("dhkd_01_losses", "binary_kl"))
def test_logit_losses(given, wanted):
    teacher, temperature = double(given["teacher_logits"]), given["temperature"]
    losses = {
        "binary_kl": lambda s: dhkd.binary_kl(s, teacher, temperature),
        "binary_kl_norm": lambda s: dhkd.binary_kl_norm(s, teacher, temperature),
        "softmax_kd": lambda s: distil.softmax_kl(s, teacher, temperature).mean(),
    }
    for name, loss in losses.items():
        known = wanted[name]
        check(loss, given["student_logits"], known["loss"], known["grad_student"])


@pytest.mark.parametrize(("given", "wanted"), cases("dhkd_01_losses", "exact_binary_kl"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logit_losses_at_saturated_logits(given, wanted, dtype):
    for name in ("binary_kl", "binary_kl_norm"):
        student = torch.tensor(given["student_logits"], dtype=dtype, requires_grad=True)
        teacher = torch.tensor(given["teacher_logits"], dtype=dtype)
        loss = getattr(dhkd, name)(student, teacher, given["temperature"])
        known = wanted[f"exact_{name}"]
        assert loss.item() == pytest.approx(known["loss"], rel=1e-6)
        (slope,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(
            slope.double(), double(known["grad_student"]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("given", "wanted"), cases("dhkd_02_grad_align"))
def test_gradient_alignment(given, wanted):
    params = {name: double(value, learned=True) for name, value in given["params"].items()}

    def layer(name: str, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, params[f"{name}.weight"], params[f"{name}.bias"])

    features = layer("body", double(given["x"])).relu()
    hard = given["gamma"] * nn.functional.cross_entropy(
        layer("head_ce", features), torch.tensor(given["labels"])
    )
    teacher = double(given["teacher_logits"])
    soft = given["alpha"] * dhkd.binary_kl_norm(
        layer("head_kd", features), teacher, given["temperature"]
    )
    gradients = [
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(
                params.values(),
                torch.autograd.grad(loss, [*params.values()], retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
        for loss in (hard, soft)
    ]
    found = dict(zip(params, dhkd.aligned(*gradients), strict=True))
    for name, value in wanted["merged_grad"].items():
        torch.testing.assert_close(found[name], double(value), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("given", "wanted"), cases("wellread_01", "student_logits"))
def test_soft_label_cross_entropy(given, wanted):
    teacher = double(given["teacher_logits"])
    check(
        lambda s: distil.soft_cross_entropy(s, teacher, given["temperature"]).mean(),
        given["student_logits"],
        wanted["loss"],
        wanted["grad"],
    )


@pytest.mark.parametrize(("given", "wanted"), cases("distiller_02_losses", "kd_ce"))
def test_distiller_logit_losses(given, wanted):
    teacher, temperature = double(given["teacher_logits"]), given["temperature"]
    losses = {
        "kd_ce": lambda s: distil.soft_cross_entropy(s, teacher, temperature).mean(),
        "kd_mse": lambda s: layer_losses.logit_mse(s, teacher, temperature).mean(),
    }
    for name, loss in losses.items():
        check(loss, given["student_logits"], wanted[name]["loss"], wanted[name]["grad"])


@pytest.mark.parametrize(("given", "wanted"), cases("distiller_02_losses", "student_hidden"))
def test_hidden_losses(given, wanted):
    teacher = double(given["teacher_hidden"])
    mask = double(given["mask"]) if given["mask"] else torch.ones(teacher.shape[:2]).double()

    def pkd(student: Tensor) -> Tensor:
        return layer_losses.normalised_distance(student[:, 0], teacher[:, 0]).mean()

    def of_states(name: str) -> Callable[[Tensor], Tensor]:
        loss = layer_losses.STATE_LOSSES[name]
        return lambda s: layer_losses.group_means(loss(s, teacher), mask, len(mask))[0]

    names = {"ce": "hid_ce_loss", "mse": "hid_mse_loss", "cos": "cos_loss", "pkd": "pkd_loss"}
    for name, key in names.items():
        known = wanted[key]
        check(
            pkd if name == "pkd" else of_states(name),
            given["student_hidden"],
            known["loss"],
            known["grad"],
        )


@pytest.mark.parametrize(("given", "wanted"), cases("distiller_03_layer_map"))
def test_layer_pairs(given, wanted):
    pairs = layer_losses.layer_pairs(
        given["strategy"],
        given["teacher_layers"],
        given["student_layers"],
        attention=given["feature"] == "attention",
    )
    assert pairs == [*zip(wanted["student_index"], wanted["teacher_index"], strict=True)]


@pytest.mark.parametrize(("given", "wanted"), cases("distiller_01_mi_alpha", "alpha_logit"))
def test_mutual_information_bound(given, wanted):
    baseline, alpha = double(given["log_baseline"]), given["alpha_logit"]
    check(
        lambda f: -layer_losses.mi_alpha(f, baseline, alpha),
        given["scores"],
        wanted["loss"],
        wanted["loss_grad_scores"],
        rtol=1e-6,
        atol=2e-7,  # the reference has float32 constants
    )
    scores = double(given["scores"])
    check(
        lambda q: -layer_losses.mi_alpha(scores, q, alpha),
        given["log_baseline"],
        wanted["loss"],
        wanted["loss_grad_baseline"],
        rtol=1e-6,
        atol=2e-7,  # the reference has float32 constants
    )


@pytest.mark.parametrize(("given", "wanted"), cases("distiller_01_mi_alpha", "tuba"))
def test_mutual_information_from_a_baseline_alone(given, wanted):
    """Alpha of 0 is TUBA, and NWJ where the baseline is 1."""
    scores, learned = double(given["scores"]), double(given["log_baseline"])
    for name, baseline in (("tuba", learned), ("nwj", torch.ones_like(learned))):
        found = layer_losses.mi_alpha(scores, baseline, -1e4)
        assert found.item() == pytest.approx(wanted[name], rel=1e-6, abs=2e-7)


@pytest.mark.parametrize(("given", "wanted"), cases("hsakd_01_losses"))
def test_rotations_and_branches(given, wanted):
    labels, temperature = torch.tensor(given["labels"]), given["temperature"]
    torch.testing.assert_close(
        lsskd.rotated(double(given["images"])), double(wanted["rotated_images"])
    )
    assert lsskd.joint_labels(labels).tolist() == wanted["joint_labels"]
    teacher, teacher_aux = double(given["teacher_logits"]), double(given["teacher_aux_logits"])
    main, aux = (double(given[k], learned=True) for k in ("student_logits", "student_aux_logits"))
    upright = lsskd.upright_loss(main, labels)
    kd = lsskd.mimicry([main, *aux], [teacher, *teacher_aux], temperature)
    assert upright.item() == pytest.approx(wanted["student_ce"], rel=1e-9)
    assert kd.item() == pytest.approx(wanted["student_kd"], rel=1e-9)
    slopes = torch.autograd.grad(upright + kd, [main, aux])
    for slope, name in zip(slopes, ("grad_student_logits", "grad_student_aux"), strict=True):
        torch.testing.assert_close(slope, double(wanted[name]), rtol=1e-9, atol=1e-11)
    total = lsskd.upright_loss(teacher, labels) + lsskd.branch_loss([*teacher_aux], labels)
    assert total.item() == pytest.approx(wanted["teacher_total"], rel=1e-9)
    known = double(wanted["class_scores_from_joint"])
    torch.testing.assert_close(
        torch.stack([lsskd.class_scores(b) for b in aux]), known, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(("given", "wanted"), cases("selfdistill_01_losses"))
def test_distance_of_states(given, wanted):
    teacher = double(given["teacher_cls_unmasked"])
    check(
        lambda s: self_distillation.squared_distances(s, teacher).mean(),
        given["student_cls_unmasked"],
        wanted["distill_loss"],
        wanted["distill_grad_student_cls"],
    )
