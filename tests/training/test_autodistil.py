"""AutoDistil: four sub-networks a step, and the best one under a limit of FLOPs."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_parts import VOCAB, small_model

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN
from stillhouse.models.sub_networks import extract, shape_of
from stillhouse.spec import ModelSettings
from stillhouse.training.objectives import ObjectiveFacts
from stillhouse.training.objectives.autodistil import (
    AutoDistil,
    best_sub_network,
    relation_losses,
    sandwich,
    space_of,
)

SIZES = {"hidden": [16, 24, 32], "mlp_ratios": [2.0, 4.0]}
HEADS = 4


@pytest.fixture
def models():
    """A student and a wider teacher with weights large enough to tell sub-networks apart."""
    settings = ModelSettings(hidden_size=64, num_layers=2)
    teacher = build_model(settings, vocab_size=VOCAB, sequence_length=12, seed=5, eos_id=0)
    student = small_model()
    with torch.no_grad():
        for parameter in [*student.parameters(), *teacher.parameters()]:
            parameter.mul_(5)
    return student, teacher.eval().requires_grad_(False)


def tokens():
    return torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))


def projected(model, ids):
    """Q, K and V of the last layer from the states before it, by its own weights."""
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    layer = model.base_model.layers[-1]
    if len(model.base_model.layers) == 1:
        states = model.get_input_embeddings()(ids)
    states = layer.input_layernorm(states)
    return [getattr(layer.self_attn, f"{n}_proj")(states) for n in "qkv"]


def relation(own, other, rows, softmaxed):
    """Written out for each row, head and pair of positions."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(own, other, strict=True):
        pieces = [[x[row].double().chunk(HEADS, -1) for x in (a, b)] for row in range(len(a))]
        for row, share in enumerate(rows):
            for left, right in zip(*pieces[row], strict=True):
                m, t = (x @ x.T / x.shape[1] ** 0.5 for x in (left, right))
                if softmaxed:
                    p, q = t.softmax(-1), m.softmax(-1)
                    loss = (p * (p.log() - q.log())).sum(-1).mean()
                else:
                    loss = (m - t).square().mean()
                total = total + share * loss / HEADS
    return total


@pytest.mark.parametrize("relations", ["mse", "kl"])
def test_a_step_trains_four_extracted_models(models, relations):
    """Loss and gradients are the sum over models of their own."""
    student, teacher = models
    facts = ObjectiveFacts(PLAIN, config=student.config, models=(teacher,))
    objective = AutoDistil(
        facts, **SIZES, relations=relations, relation_heads=HEADS, hard_weight=0.5
    )
    objective.at_step(3, 10)
    ids, mask = tokens(), torch.ones(3, 8)
    mask[0, 4:] = 0
    value = objective(student, ids, {"loss_mask": mask})
    value.objective.backward()
    kept = mask[:, 1:].bool()
    rows = kept.sum(1) / kept.sum()
    sizes = sandwich(objective.space, 3)
    assert len({*sizes}) == 4
    taught, total = projected(teacher, ids), 0.0
    slopes = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    for size in sizes:
        small = extract(student, size)
        logits = small(input_ids=ids).logits[:, :-1]
        nll = cross_entropy(logits[kept], ids[:, 1:][kept])
        loss = relation(projected(small, ids), taught, rows, relations == "kl") + 0.5 * nll
        loss.backward()
        total += loss.item()
        for name, p in small.named_parameters():
            if p.grad is not None:
                slopes[name][tuple(slice(n) for n in p.shape)] += p.grad
        if size == objective.space[-1]:
            assert value.nll.item() == pytest.approx(nll.item(), rel=1e-5)
    assert value.objective.item() == pytest.approx(total, rel=1e-5)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, slopes[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("softmaxed", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1.0), (torch.bfloat16, 1e4)])
def test_relations_in_low_precision(dtype, scale, softmaxed):
    generator = torch.Generator().manual_seed(0)
    own, other = (
        [(scale * torch.randn(2, 5, 8, generator=generator)).to(dtype) for _ in range(3)]
        for _ in range(2)
    )
    points = [x.requires_grad_() for x in own]
    found = relation_losses(points, other, num_heads=HEADS, softmaxed=softmaxed)
    assert found.dtype == torch.float32 and found.isfinite().all()
    found.sum().backward()
    assert all(x.grad.isfinite().all() for x in points)
    exact = [x.detach().double() for x in own], [x.double() for x in other]
    wanted = relation_losses(*exact, num_heads=HEADS, softmaxed=softmaxed)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("softmaxed", [False, True])
def test_gradients_are_those_of_finite_differences(softmaxed):
    generator = torch.Generator().manual_seed(0)
    own, other = (
        [torch.randn(2, 3, 8, generator=generator).double() for _ in range(3)] for _ in range(2)
    )

    def losses(*x):
        return relation_losses(x, other, num_heads=HEADS, softmaxed=softmaxed)

    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in own])


def test_the_best_under_a_limit(models):
    """Of all that fit, the one whose extracted model is nearest to the teacher."""
    student, teacher = models
    space, ids = space_of(student.config, **SIZES), tokens()
    costs = [shape_of(student.config, one).flops_per_token(8) for one in space]
    limit = sorted(costs)[3]
    found = best_sub_network(student, teacher, space, ids, limit, relation_heads=HEADS)
    taught, rows = projected(teacher, ids), [1 / 3] * 3
    fitting = [one for one, cost in zip(space, costs, strict=True) if cost <= limit]
    assert len(fitting) == 4
    losses = {
        one: relation(projected(extract(student, one), ids), taught, rows, False).item()
        for one in fitting
    }
    assert found == min(losses, key=losses.get)
    with pytest.raises(SpecError, match="FLOPs a token, more than the 10 that are allowed"):
        best_sub_network(student, teacher, space, ids, 10)


def test_other_architectures_are_refused():
    settings = ModelSettings(architecture="gpt_neox", hidden_size=32, num_layers=1)
    model = build_model(settings, vocab_size=VOCAB, sequence_length=12, seed=0, eos_id=0)
    with pytest.raises(SpecError, match="cuts llama and qwen3, not 'gpt_neox'"):
        space_of(model.config, **SIZES)
