import pytest
import torch
from trajectory_vectors import relative_error

from stillhouse.distillation.adjoint import unrolled
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.pds import (
    PdsRun,
    directional,
    pds_scores,
    train_for_scores,
    uniform_weights,
    weight_gradients,
)
from stillhouse.errors import DivergedError
from stillhouse.models.causal_lm import build_model
from stillhouse.selection.color import token_nll
from stillhouse.spec import ModelSettings

VOCABULARY, LENGTH = 64, 8


def language_model(dtype=torch.float64):
    settings = ModelSettings(hidden_size=16, num_layers=1, num_heads=1)
    model = build_model(settings, vocab_size=VOCABULARY, sequence_length=LENGTH, seed=0, eos_id=0)
    model.set_attn_implementation("eager")
    return FlatModule(model.to(dtype))


NETWORK = language_model()


def losses(theta, input_ids):
    logits = NETWORK(theta, input_ids=input_ids, use_cache=False).logits
    log_probs = logits[:, :-1].log_softmax(-1)
    return -log_probs.gather(-1, input_ids[:, 1:, None]).squeeze(-1).mean(-1)


def sequences(count, seed):
    return torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def run(learning_rate=0.5, num_steps=3):
    batches = [sequences(4, step) for step in range(num_steps)]
    return PdsRun(losses, batches, sequences(3, 10), learning_rate)


def test_losses_are_the_mean_nll():
    ids = sequences(2, 0)
    expected = token_nll(NETWORK(NETWORK.parameters(), input_ids=ids).logits, ids).mean(-1)
    torch.testing.assert_close(losses(NETWORK.parameters(), ids).float(), expected)


def test_weight_gradients_are_autograds_through_the_run():
    start = NETWORK.parameters()
    weights = [weight.requires_grad_() for weight in uniform_weights(run(), start)]
    expected = unrolled(run().descent(weights, start), start, 3, run().objective, weights)
    found = weight_gradients(run(), train_for_scores(run(), start).states)
    for mine, unrolled_one in zip(found, expected.leaves, strict=True):
        assert relative_error(mine, unrolled_one) < 1e-10


def test_scores_of_a_full_batch_run_are_minus_the_gradients_sum():
    """Where each step trains on all sequences, a weight acts in every step."""
    start, ids = NETWORK.parameters(), sequences(4, 0)
    full = PdsRun(losses, [ids] * 3, sequences(3, 10), 0.5)
    states = train_for_scores(full, start).states
    shared = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
    expected = unrolled(full.descent([shared] * 3, start), start, 3, full.objective, [shared])
    found = pds_scores(full, states, [ids[:1], ids[1:]])
    assert relative_error(found, -expected.leaves[0]) < 1e-10


def test_a_sequence_outside_the_run_is_weighed_by_its_first_bit():
    start, ids = NETWORK.parameters(), sequences(2, 20)
    bits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    batches = [torch.cat([batch, ids]) for batch in run().batches]
    weights = [torch.cat([weight, bits]) for weight in uniform_weights(run(), start)]
    wider = PdsRun(losses, batches, run().target, 0.5)
    expected = unrolled(wider.descent(weights, start), start, 3, wider.objective, [bits])
    found = pds_scores(run(), train_for_scores(run(), start).states, [ids])
    assert relative_error(found, -expected.leaves[0]) < 1e-10


def test_the_targets_own_sequences_score_above_random_ones():
    states = train_for_scores(run(), NETWORK.parameters()).states
    target, other = pds_scores(run(), states, [run().target, sequences(12, 30)]).split([3, 12])
    assert target.min() > other.max()


def test_every_second_step_counts_twice():
    states, ids = train_for_scores(run(), NETWORK.parameters()).states, sequences(2, 20)
    seen = []

    def spy(theta, input_ids):
        if input_ids is ids:
            seen.append(theta)
        return losses(theta, input_ids)

    spied = PdsRun(spy, run().batches, run().target, 0.5)
    pds_scores(spied, states, [ids], every=2)
    assert len(seen) == 2


def test_directional_derivative_is_the_gradients_product():
    theta = NETWORK.parameters().requires_grad_()
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double()
    ids = sequences(3, 0)
    products = [
        torch.autograd.grad(value, theta, retain_graph=True)[0] @ direction
        for value in losses(theta, ids)
    ]
    found = directional(losses, theta.detach(), direction, ids)
    assert relative_error(found, torch.stack(products)) < 1e-6  # its norms compute in float32


def test_a_run_that_diverges_is_named():
    with pytest.raises(
        DivergedError, match=r"not finite after \d of 3 steps at learning rate 1e\+"
    ):
        train_for_scores(run(learning_rate=1e300), NETWORK.parameters())
