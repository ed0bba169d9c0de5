"""Dual-head distillation of language models against its equation, with all logits at once."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN
from stillhouse.spec import ModelSettings
from stillhouse.training.group import WorkerGroup
from stillhouse.training.objectives import ObjectiveFacts
from stillhouse.training.objectives.dual_head import DualHead

VOCAB, KNOWN = 50, 40  # rows of the models' matrices, and tokens of the tokenizer


def small(seed, width):
    settings = ModelSettings(hidden_size=width, num_layers=1)
    return build_model(settings, vocab_size=VOCAB, sequence_length=12, seed=seed, eos_id=0)


def given():
    """Student, teacher, tokens [4, 7] and a mask."""
    teacher = small(2, 48).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, KNOWN, (4, 7), generator=generator)
    mask = torch.randint(0, 2, (4, 7), generator=generator).float()
    return small(1, 32), teacher, ids, mask


def naive(student, head, teacher, ids, mask):
    """Of the text, and of the teacher at temperature 3: means over the tokens that count."""
    marked = mask[:, 1:].flatten().double() / mask[:, 1:].sum()
    states = student.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1).double()
    text = (cross_entropy(logits, ids[:, 1:].flatten(), reduction="none") * marked).sum()
    taught = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)[:, :KNOWN].double()
    p = torch.sigmoid((states.double() @ head.double().T - taught) / 3)
    losses = 9 * (0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()).sum(1)
    return text, (losses * marked).sum()


@pytest.mark.parametrize("align", [False, True])
def test_both_losses_and_their_gradients(align):
    student, teacher, ids, mask = given()
    facts = ObjectiveFacts(PLAIN, config=student.config, models=(teacher,), vocab_size=KNOWN)
    options = {"gamma": 0.7, "alpha": 0.2, "temperature": 3.0, "z_loss": 0.0}
    objective = DualHead(facts, **options, align=align)
    assert objective.head.weight.shape == (KNOWN, 32)
    learned = [*student.parameters(), *objective.parameters()]
    value = objective(student, ids, {"loss_mask": mask})
    text, soft = naive(student, objective.head.weight, teacher, ids, mask)
    assert value.nll.item() == pytest.approx(text.item(), rel=1e-5)
    losses = [(value.objective, 0.7 * text)]
    if align:
        losses.append((value.second, 0.2 * soft))
    else:
        assert value.second is None
        losses = [(value.objective, 0.7 * text + 0.2 * soft)]
    for found, wanted in losses:
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        slopes = (
            torch.autograd.grad(one, learned, retain_graph=True, allow_unused=True)
            for one in (found, wanted)
        )
        for one, other in zip(*slopes, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other.to(one), rtol=1e-4, atol=1e-7)


def test_aligning_sharded_gradients_is_refused():
    student, teacher, *_ = given()
    group = WorkerGroup()
    group.sharded = True
    facts = ObjectiveFacts(PLAIN, config=student.config, models=(teacher,), group=group)
    with pytest.raises(SpecError, match=r"`train\.objective\.align` needs whole gradients"):
        DualHead(facts, align=True)
