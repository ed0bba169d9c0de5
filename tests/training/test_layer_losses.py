"""Distiller's layer term: gradients, precision, transport plans, groups."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from training_parts import VOCAB, small_model

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN
from stillhouse.spec import ModelSettings
from stillhouse.training.objectives import ObjectiveFacts
from stillhouse.training.objectives.distiller import Distiller
from stillhouse.training.objectives.layer_losses import mi_alpha, transport_plan
from stillhouse.training.objectives.layer_term import LayerTerm

ROWS, LENGTH, WIDE, NARROW = 6, 4, 5, 3
KINDS = ["mse", "cos", "ce", "pkd", "mi"]


def term(kind, mapping="skip", rows=3, learned=False, seed=0):
    torch.manual_seed(seed)
    depths, widths = (1, 2), (NARROW, WIDE)
    return LayerTerm(kind, mapping, depths, widths, alpha=0.9, learned=learned, rows=rows)


def states(dtype=torch.float64, scale=1.0):
    """Of a student of one layer and a teacher of two, and which positions count."""
    generator = torch.Generator().manual_seed(1)

    def draw(width):
        values = torch.randn(ROWS, LENGTH, width, generator=generator, dtype=torch.float64)
        return (scale * values).to(dtype)

    mask = torch.ones(ROWS, LENGTH)
    mask[0, 2:], mask[4, 0] = 0, 0
    return [draw(NARROW) for _ in range(2)], [draw(WIDE) for _ in range(3)], mask


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    student, teacher, mask = states()
    made = term(kind).double()
    points = [x.requires_grad_() for x in student]
    torch.manual_seed(0)  # of the projections in fast mode
    assert torch.autograd.gradcheck(
        lambda *x: made(x, teacher, mask.double()), points, fast_mode=True
    )
    parameters = [p for p in made.parameters() if p.requires_grad]

    def of(*values):
        names = [name for name, p in made.named_parameters() if p.requires_grad]
        given = dict(zip(names, values, strict=True))
        fixed = [x.detach() for x in student]
        return torch.func.functional_call(made, given, (fixed, teacher, mask.double()))

    assert torch.autograd.gradcheck(
        of, [p.detach().requires_grad_() for p in parameters], fast_mode=True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapping", ["last", "emd"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e4), (torch.bfloat16, 1e4)])
def test_low_precision_and_large_states(kind, mapping, dtype, scale):
    student, teacher, mask = states(dtype, scale)
    points = [x.requires_grad_() for x in student]
    loss = term(kind, mapping)(points, teacher, mask)
    assert loss.dtype == torch.float32 and loss.isfinite()
    exact = [x.detach().double() for x in student], [x.double() for x in teacher], mask.double()
    assert loss.item() == pytest.approx(term(kind, mapping).double()(*exact).item(), rel=1e-4)
    loss.backward()
    found = [x.grad for x in points if x.grad is not None]
    assert found and all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapping", ["skip", "emd"])
def test_groups_add_up_by_their_tokens(kind, mapping):
    """A whole batch is the mean of its groups, weighed by the tokens that count."""
    student, teacher, mask = states()
    made, mask = term(kind, mapping).double(), mask.double()
    whole = made(student, teacher, mask)
    halves = [slice(0, 3), slice(3, 6)]
    parts = [made([x[h] for x in student], [x[h] for x in teacher], mask[h]) for h in halves]
    wanted = sum(loss * mask[h].sum() for loss, h in zip(parts, halves, strict=True)) / mask.sum()
    torch.testing.assert_close(whole, wanted)


def test_transport_is_the_cheapest_assignment():
    """Of as many layers with equal shares, against all permutations."""
    cost = torch.rand(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shares = torch.zeros(4).double().log_softmax(0)
    plan = transport_plan(cost, shares, shares)
    costs = {p: sum(cost[i, p[i]].item() for i in range(4)) / 4 for p in permutations(range(4))}
    best = min(costs, key=costs.get)
    assert [int(row.argmax()) for row in plan] == [*best]
    most = (cost.max() - cost.min()).item() * np.log(16) / 50  # what the plan's entropy may cost
    assert 0 <= (plan * cost).sum().item() - costs[best] < most
    uneven = torch.tensor([0.7, 0.2, 0.1]).double().log()
    plan = transport_plan(cost[:3], uneven, shares)
    np.testing.assert_allclose(plan.sum(1).numpy(), [0.7, 0.2, 0.1], rtol=1e-3)
    np.testing.assert_allclose(plan.sum(0).numpy(), [0.25] * 4, rtol=1e-6)


def test_critics_score_the_sequences_of_a_group_against_each_other():
    """The bound of each group of three from its mean states, written out."""
    student, teacher, mask = states()
    made = term("mi").double()
    found = made(student, teacher, mask.double())
    total = 0.0
    for i, j in ((0, 0), (1, 2)):
        for group in (range(3), range(3, 6)):
            means = []
            for values in (student[i], teacher[j]):
                rows = [values[r][mask[r].bool()].mean(0) for r in group]
                means.append([(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in rows])
            left = [made.student_critics[f"{i}"](x) for x in means[0]]
            right = [made.teacher_critics[f"{j}"](x) for x in means[1]]
            scores = torch.stack([torch.stack([s @ t for t in right]) for s in left])
            baseline = torch.stack([made.baselines[f"{i}"](x)[0] for x in means[0]])
            count = sum(mask[r].sum() for r in group)
            total -= mi_alpha(scores, baseline, np.log(9)) * count / mask.sum()
    torch.testing.assert_close(found, total)


def naive(student, teacher, widen, ids, mask):
    """The definition: 0.5 CE + mse of logits at T = 2 + 0.3 mse of layers (0, 0) and (1, 2)."""
    kept = mask[:, 1:].bool()
    own, other = (m(input_ids=ids, output_hidden_states=True) for m in (student, teacher))
    logits, taught = own.logits[:, :-1][kept], other.logits[:, :-1][kept].detach()
    loss = 0.5 * cross_entropy(logits, ids[:, 1:][kept]) + ((logits - taught) / 2).square().mean()
    for i, j in ((0, 0), (1, 2)):
        gap = widen(own.hidden_states[i]) - other.hidden_states[j].detach()
        loss = loss + 0.3 * gap[:, :-1][kept].square().mean()
    return loss


def test_objective_and_gradients_are_the_definition():
    settings = ModelSettings(hidden_size=48, num_layers=2)
    teacher = build_model(settings, vocab_size=VOCAB, sequence_length=12, seed=5, eos_id=0)
    teacher.eval().requires_grad_(False)
    student = small_model()
    facts = ObjectiveFacts(PLAIN, config=student.config, models=(teacher,))
    objective = Distiller(
        facts, layers_weight=0.3, hard_weight=0.5, temperature=2.0, mapping="skip"
    )
    ids = torch.randint(0, VOCAB, (5, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    value = objective(student, ids, {"loss_mask": mask})
    value.objective.backward()
    widen = objective.layers.widen
    learned = [*student.parameters(), *widen.parameters()]
    found = [p.grad.clone() for p in learned]
    wanted = naive(student.double(), teacher.double(), widen.double(), ids, mask.double())
    assert value.objective.item() == pytest.approx(wanted.item(), rel=1e-5)
    slopes = torch.autograd.grad(wanted, learned)
    for one, other in zip(found, slopes, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def test_softmax_of_one_logit_is_refused():
    """Its cross-entropy is constant: no gradient."""
    teacher = small_model(seed=2)
    facts = ObjectiveFacts(PLAIN, config=teacher.config, models=(teacher,), vocab_size=1)
    with pytest.raises(SpecError, match="use mse for a single logit"):
        Distiller(facts, logits="ce")


def test_mixup_pairs_sequences_of_a_group_by_what_they_say():
    """The same wherever the group is; another at each step and seed."""
    teacher = small_model(seed=2).eval().requires_grad_(False)
    facts = ObjectiveFacts(PLAIN, config=small_model().config, models=(teacher,))
    ids = torch.randint(0, VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
    made = Distiller(facts, mixup=True, group_rows=4, layers_weight=0.0)
    partner, share = made._draw(ids)
    assert sorted(partner[:4].tolist()) == [0, 1, 2, 3]
    assert sorted(partner[4:].tolist()) == [4, 5, 6, 7]
    swapped = made._draw(torch.cat([ids[4:], ids[:4]]))
    assert torch.equal(swapped[1], torch.cat([share[4:], share[:4]]))
    assert torch.equal(swapped[0][:4], partner[4:] - 4)
    made.at_step(1, 10)
    assert not torch.equal(made._draw(ids)[1], share)
    many = [
        Distiller(facts, mixup=True, seed=s, layers_weight=0.0)._draw(ids)[1] for s in range(300)
    ]
    drawn = torch.cat(many).double()
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn.var().item() == pytest.approx(
        0.25 / 1.8, abs=0.01
    )  # a b / (a + b)^2 / (a + b + 1)


@pytest.mark.parametrize("alpha_logit", [np.log(9), 30.0])
def test_a_sure_critic_has_gradients(alpha_logit):
    """Pairs that belong together score 200 nats above the others, whose exp overflows float32."""
    rng = np.random.default_rng(0)
    scores = 200.0 * np.eye(4) + rng.standard_normal((4, 4))
    baseline = torch.from_numpy(rng.standard_normal(4))

    def bound(values):
        return float(mi_alpha(torch.from_numpy(values), baseline, alpha_logit))

    single = torch.from_numpy(scores).float().requires_grad_()
    mi_alpha(single, baseline.float(), alpha_logit).backward()
    found = np.zeros((4, 4))
    for at in np.ndindex(4, 4):
        step = np.zeros((4, 4))
        step[at] = 1e-5
        found[at] = (bound(scores + step) - bound(scores - step)) / 2e-5
    np.testing.assert_allclose(single.grad.numpy(), found, atol=1e-4)
