"""Distillation from stored top tokens: against the full distributions, in float64."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from stillhouse.errors import InputError
from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN, Head
from stillhouse.models.token_samples import drawn_tokens, top_tokens
from stillhouse.spec import ModelSettings
from stillhouse.training.objectives import ObjectiveFacts, chunked
from stillhouse.training.objectives.chunked import ChunkLosses, chunked_losses
from stillhouse.training.objectives.distil import (
    Distil,
    TopTokens,
    distillation_loss,
)

NUM, VOCAB = 7, 30


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(NUM, VOCAB, generator=generator) for _ in range(2)]


def full_kl(first: torch.Tensor, second: torch.Tensor, temperature: float) -> np.ndarray:
    p, q = ((x.double() / temperature).softmax(1).numpy() for x in (first, second))
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum(1)


def of_top(teacher: torch.Tensor, top_k: int, temperature: float) -> TopTokens:
    ids, log_probs, tails = top_tokens(teacher, top_k, [temperature])
    return TopTokens(ids.long(), log_probs, tails[:, 0])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_tokens_give_the_exact_divergence(logits, temperature, reverse):
    teacher, student = logits
    stored = of_top(teacher, VOCAB, temperature)
    assert (stored.tail == -torch.inf).all()
    found = distillation_loss(student, stored, temperature, reverse=reverse)
    first, second = (student, teacher) if reverse else (teacher, student)
    np.testing.assert_allclose(found.numpy(), full_kl(first, second, temperature), rtol=5e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_tail_is_one_event(logits, temperature):
    teacher, student = logits
    ids, log_probs, tails = top_tokens(teacher, 4, [1.0, temperature])
    assert (log_probs.dtype, tails.dtype) == (torch.float16, torch.float32)
    p, q = ((x.double() / temperature).softmax(1).numpy() for x in (teacher, student))
    best = np.argsort(-teacher.numpy(), 1)[:, :4]
    assert ids.tolist() == best.tolist()

    def merged(x: np.ndarray) -> np.ndarray:
        kept = np.take_along_axis(x, best, 1)
        return np.concatenate([kept, 1 - kept.sum(1, keepdims=True)], 1)

    p, q = merged(p), merged(q)
    wanted = temperature**2 * (p * np.log(p / q)).sum(1)
    stored = TopTokens(ids.long(), log_probs, tails[:, 1])
    found = distillation_loss(student, stored, temperature)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_finite_differences(logits, reverse):
    teacher, student = logits
    stored = of_top(teacher, 5, 2.0)
    point = student[:2].double().requires_grad_()
    stored = TopTokens(*(x[:2] for x in stored))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return distillation_loss(x, stored, 2.0, reverse=reverse).sum()

    assert torch.autograd.gradcheck(loss, (point,))


def test_drawn_tokens_are_the_distribution_on_average(logits):
    teacher, _ = logits
    uniform = torch.rand(4000, 8, generator=torch.Generator().manual_seed(1))
    ids, log_probs, tails = drawn_tokens(teacher[:1].expand(4000, -1), uniform)
    assert (tails == -torch.inf).all()
    probs = log_probs.double().exp()
    np.testing.assert_allclose(probs.sum(1).numpy(), 1, rtol=1e-3)
    assert (log_probs[:, 1:] <= log_probs[:, :-1]).all()
    mean = torch.zeros(VOCAB).double().scatter_add_(0, ids.long().ravel(), probs.ravel()) / 4000
    wanted = teacher[0].double().softmax(0)
    spread = (wanted * (1 - wanted) / 8 / 4000).sqrt()
    assert ((mean - wanted).abs() < 5 * spread + 1e-4).all()


def test_chunks_give_the_loss_and_gradients_of_all_at_once(monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", {"cpu": 1})  # chunks of 64 positions
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(150, 6, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 6, generator=generator, requires_grad=True)
    targets = torch.randint(VOCAB, (150,), generator=generator)

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> ChunkLosses:
        nll = cross_entropy(logits, targets, reduction="none")
        return ChunkLosses(nll * 2, nll)

    mean, _, nll = chunked_losses(hidden, Head(weight), losses, [targets], None)
    found = torch.autograd.grad(mean * 3 * 150, [hidden, weight])
    whole = cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(nll, whole.detach())
    wanted = torch.autograd.grad(whole.sum() * 6, [hidden, weight])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def naive(student, teachers, ids, mask, weight, temperature):
    """The definition, with all logits in float64: CE and KL to the average of what teachers say."""
    kept = mask[:, 1:].bool()
    logits = student(input_ids=ids).logits[:, :-1][kept].double()
    ce = cross_entropy(logits, ids[:, 1:][kept])
    kl = torch.zeros(())
    for share, teacher in teachers:
        with torch.no_grad():
            p = (teacher(input_ids=ids).logits[:, :-1][kept].double() / temperature).softmax(-1)
        q = (logits / temperature).log_softmax(-1)
        kl = kl + share * temperature**2 * (p * (p.log() - q)).sum(-1).mean()
    return (1 - weight) * ce + weight * kl


@pytest.mark.parametrize("masked", [False, True])
def test_objective_and_gradients_are_the_definition(masked):
    student, *teachers = (small_model(seed) for seed in range(3))
    ids = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 12)
    if masked:
        mask = (torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    facts = ObjectiveFacts(PLAIN, teachers=(0.75, 0.25), temperatures=(1.0, 2.0))
    signals = {"loss_mask": mask} if masked else {}
    for i, teacher in enumerate(teachers):
        with torch.no_grad():
            logits = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)
        made = top_tokens(logits, logits.shape[1], facts.temperatures)
        made[1] = logits.log_softmax(1).sort(1, descending=True).values  # not rounded to float16
        for name, values in zip(("ids", "log_probs", "tails"), made, strict=True):
            signals[f"{name}.{i}"] = values.reshape(5, -1)
    objective = Distil(facts, weight=0.3, temperature=2.0, z_loss=0.0)
    value = objective(student, ids, signals)
    (value.objective * 2).backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    wanted = naive(student, [*zip((0.75, 0.25), teachers, strict=True)], ids, mask, 0.3, 2.0)
    (wanted * 2).backward()
    assert value.objective.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)
    plain = objective(student, ids, {})  # as on held-out sequences
    logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
    losses = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(plain.token_nll, losses.view(5, -1))


def test_a_teacher_that_gives_nan_is_refused():
    with pytest.raises(InputError, match="gives NaN"):
        top_tokens(torch.full((2, 5), torch.nan), 2, [1.0])


def small_model(seed):
    settings = ModelSettings(hidden_size=32, num_layers=1)
    model = build_model(settings, vocab_size=96, sequence_length=12, seed=seed, eos_id=0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model
