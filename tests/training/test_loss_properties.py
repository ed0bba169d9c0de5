"""What every loss between tensors has to be: finite in float32 at saturated inputs of any type, and
with the slopes of its own values.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.training.objectives import (
    aggregate,
    dhkd,
    distil,
    hybrid,
    layer_losses,
    lsskd,
    masked,
    self_distillation,
    small_losses,
    weak_to_strong,
)

ROWS, CLASSES = 4, 8
LABELS = torch.tensor([1, 0, 1, 1])
WEAK = torch.linspace(1, 3, ROWS * CLASSES, dtype=torch.float64).view(ROWS, CLASSES)
WEAK = WEAK / WEAK.sum(1, keepdim=True)
TOP = distil.TopTokens(
    torch.tensor([[1, 4], [0, 2], [7, 3], [5, 6]]),
    torch.tensor([[0.0, -9.0], [-0.7, -0.8], [-1.2, -3.0], [-2.0, -2.1]]),
    torch.tensor([-9.0, -3.0, -0.6, -0.3]),
)


def bags(student, _):
    return aggregate.cross_entropy(distil.promoted(student).log_softmax(1)[None], WEAK[:1], 0.3)


LOSSES = {
    "binary_kl": lambda s, t: dhkd.binary_kl(s, t, 2.0),
    "binary_kl_norm": lambda s, t: dhkd.binary_kl_norm(s, t, 2.0),
    "softmax_kl": lambda s, t: distil.softmax_kl(s, t, 2.0).mean(),
    "soft labels": lambda s, t: distil.soft_cross_entropy(s, t).mean(),
    "top tokens": lambda s, _: distil.distillation_loss(s, TOP).mean(),
    "top tokens, reverse": lambda s, _: distil.distillation_loss(s, TOP, reverse=True).mean(),
    "logits, mse": lambda s, t: layer_losses.logit_mse(s, t).mean(),
    "confidence": lambda s, _: weak_to_strong.soft_label_loss(s, WEAK),
    "bags": bags,
    "bags, squared": lambda s, _: aggregate.squared(s, WEAK[:, 0], 0.3),
    "upright": lambda s, _: lsskd.upright_loss(s, LABELS[:1]),
    "branches": lambda s, _: lsskd.branch_loss([s, 2 * s], LABELS[:1]),
    "mimicry": lambda s, t: lsskd.mimicry([s, s], [t, -t], 3.0),
    "relations": lambda s, t: hybrid.relation_loss(s.view(1, 2, 4, 4), t.view(1, 2, 4, 4)),
    "features": lambda s, t: hybrid.feature_loss(s[None], t[None]),
    "patches": lambda s, t: masked.patch_errors(s, t).mean(),
    "mean states": lambda s, t: self_distillation.squared_distances(s, t).mean(),
    "ranking": lambda s, t: small_losses.ranking_loss(s, t),
}
SATURATED = st.lists(
    st.sampled_from([-1e4, -30.0, 0.0, 3.0, 1e4]),
    min_size=2 * ROWS * CLASSES,
    max_size=2 * ROWS * CLASSES,
).map(lambda values: torch.tensor(values).view(2, ROWS, CLASSES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*LOSSES])
@settings(max_examples=25)
@given(both=SATURATED)
def test_saturated_inputs_give_finite_numbers(name, dtype, both):
    student, teacher = both.to(dtype)
    student = student.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    (slope,) = torch.autograd.grad(loss, student)
    assert loss.dtype in (torch.float32, torch.float64) and loss.isfinite()
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", [*LOSSES])
def test_slopes_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, ROWS, CLASSES, generator=generator).double() * 2
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", [*LOSSES])
def test_teachers_get_no_gradient(name):
    student, teacher = torch.randn(2, ROWS, CLASSES, generator=torch.Generator().manual_seed(1))
    student.requires_grad_(), teacher.requires_grad_()
    LOSSES[name](student, teacher).backward()
    assert student.grad is not None
    assert name in ("patches", "ranking") or teacher.grad is None


def test_own_predictions_are_targets_without_a_graph():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weak = torch.full((6, 3), 1 / 3, requires_grad=True)
    assert not weak_to_strong.confidence_targets(logits, weak, 0.5).requires_grad
