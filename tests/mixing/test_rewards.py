"""Rewards from gradients that are kept apart by arm."""

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.mixing.rewards import Aim, GradientCapture, compared_parameters
from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings

VOCAB = 64
NAMES = ("alignment", "magnitude", "aggregate")
ZERO, ONES = torch.zeros(4), torch.ones(4)


def test_zero_gradients():
    assert [Aim(ZERO).reward(ZERO, name) for name in NAMES] == [0, 1, 1.5]
    assert Aim(ONES).reward(ZERO, "alignment") == 0
    assert Aim(ONES).reward(ZERO, "magnitude") == pytest.approx(0, abs=1e-8)


def test_low_precision_is_accumulated_in_float32():
    ones = torch.ones(5000, dtype=torch.bfloat16)  # a bfloat16 sum of ones sticks at 256
    half = torch.cat([torch.ones(2500), torch.zeros(2500)]).bfloat16()
    assert Aim(ones).reward(half, "alignment") == pytest.approx(0.5**0.5, abs=1e-6)
    assert Aim(ones).reward(half, "magnitude") == pytest.approx(2 * 0.5**0.5 / 1.5, abs=1e-6)


def test_long_gradients_are_summed_in_chunks():
    """One float32 sum over so many values is off by percents, which magnitudes would show."""
    ones = torch.full((20_000_000,), 0.1)
    assert Aim(ones).reward(3 * ones, "alignment") == pytest.approx(1, abs=1e-6)
    assert Aim(ones).reward(3 * ones, "magnitude") == pytest.approx(0.6, abs=1e-6)
    assert Aim(ones)._square == pytest.approx(200_000, rel=1e-4)


def small(tie=False):
    given = {"hidden_size": 32, "num_layers": 1, "tie_embeddings": tie}
    settings = ModelSettings.model_validate(given)
    return build_model(settings, vocab_size=VOCAB, sequence_length=16, seed=0, eos_id=0)


def batches(count):
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (4, 16), generator=rng) for _ in range(count)]


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def capture_of(model, part="output_head"):
    return GradientCapture(list(compared_parameters(model, part).values()))


@pytest.mark.parametrize("tie", [False, True])
def test_each_arm_gets_its_own_and_training_accumulates(tie):
    model, data = small(tie), batches(3)
    weight = model.get_output_embeddings().weight
    alone = [torch.autograd.grad(loss(model, ids), [weight])[0].flatten() for ids in data]
    capture = capture_of(model)
    for arm, ids in zip([7, 2, 7], data, strict=True):
        with capture.arm(arm):
            loss(model, ids).backward()
    torch.testing.assert_close(capture.take(7), alone[0] + alone[2])
    torch.testing.assert_close(capture.take(2), alone[1])
    torch.testing.assert_close(weight.grad.flatten(), sum(alone))
    assert not capture.take(7).any()  # it was taken


def test_a_small_gradient_survives_a_large_one_in_bfloat16():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    capture = GradientCapture([weight])
    small_one = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    with capture.arm(0):
        (weight * 1024).sum().backward()
    with capture.arm(1):
        (weight * small_one).sum().backward()
    difference = weight.grad - 1024  # what the published code would see: 1024 + 3 has no digits
    assert difference.tolist() == [0, 0, 0]
    taken = capture.take(1)
    assert taken.tolist() == [1, 2, 3] and taken.dtype == torch.float32


def test_outside_an_arm_nothing_is_kept():
    model, (ids,) = small(), batches(1)
    capture = capture_of(model)
    loss(model, ids).backward()
    assert not capture.take(1).any()
    capture.close()
    with capture.arm(1):
        loss(model, ids).backward()
    assert not capture.take(1).any()


def test_several_parameters_lie_one_after_the_other():
    model, (ids,) = small(), batches(1)
    found = compared_parameters(model, "layers.0.mlp")
    assert [name.split(".")[-2] for name in found] == ["gate_proj", "up_proj", "down_proj"]
    capture = GradientCapture(list(found.values()))
    with capture.arm(0):
        loss(model, ids).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in found.values()])
    torch.testing.assert_close(capture.take(0), expected)


def test_parameters_by_name():
    assert list(compared_parameters(small(), "output_head")) == ["lm_head.weight"]
    tied = compared_parameters(small(tie=True), "output_head")
    assert list(tied) == ["model.embed_tokens.weight"]
    with pytest.raises(ModelError, match=r"contains 'lm_hed'.*lm_head"):
        compared_parameters(small(), "lm_hed")
