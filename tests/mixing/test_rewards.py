"""Rewards from gradients that are kept separately by arm."""

import json

import pytest
import torch
from vector_cases import VECTORS

from stillhouse.errors import ModelError
from stillhouse.mixing.rewards import GradientCapture, TargetGradient, compared_parameters
from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings

VOCAB = 64
NAMES = ("alignment", "magnitude", "aggregate")
PUBLISHED = {"cosine": "alignment", "magnitude": "magnitude", "cosine_and_magnitude": "aggregate"}
ZERO, ONES = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    "case",
    json.loads((VECTORS / "flad_01_rewards.json").read_text())["cases"],
    ids=lambda case: case["description"],
)
def test_published_rewards(case):
    target, arm = (torch.tensor(case["inputs"][key]) for key in ("target_grad", "aux_grad"))
    got = {key: TargetGradient(target).reward(arm, name) for key, name in PUBLISHED.items()}
    assert got == pytest.approx(case["outputs"], rel=0, abs=2e-6)


@pytest.mark.parametrize(
    ("target", "arm", "alignment", "magnitude"),
    [
        (ZERO, ZERO, 0, 1),
        (ONES, ZERO, 0, pytest.approx(0, abs=1e-8)),
        # a bfloat16 sum of ones sticks at 256
        (
            torch.ones(5000, dtype=torch.bfloat16),
            torch.cat([torch.ones(2500), torch.zeros(2500)]).bfloat16(),
            pytest.approx(0.5**0.5, abs=1e-6),
            pytest.approx(2 * 0.5**0.5 / 1.5, abs=1e-6),
        ),
        # one float32 sum over so many values is off by percents, which magnitudes would show
        (
            torch.full((20_000_000,), 0.1),
            torch.full((20_000_000,), 0.3),
            pytest.approx(1, abs=1e-6),
            pytest.approx(0.6, abs=1e-6),
        ),
    ],
    ids=["zeros", "a zero", "bfloat16", "long"],
)
def test_zero_long_and_low_precision_gradients(target, arm, alignment, magnitude):
    found = [TargetGradient(target).reward(arm, name) for name in NAMES]
    assert found[:2] == [alignment, magnitude]
    assert found[2] == pytest.approx((1 + found[0]) / 2 + found[1])


def small(tie=False):
    settings = ModelSettings(hidden_size=32, num_layers=1, tie_embeddings=tie)
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
    loss(model, data[0]).backward()  # outside an arm nothing is kept
    assert not capture.take(1).any()


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


def test_parameters_are_found_by_name_and_flattened_in_order():
    model, (ids,) = small(), batches(1)
    assert list(compared_parameters(model, "output_head")) == ["lm_head.weight"]
    assert list(compared_parameters(small(tie=True), "output_head")) == [
        "model.embed_tokens.weight"
    ]
    with pytest.raises(ModelError, match=r"contains 'lm_hed'.*lm_head"):
        compared_parameters(model, "lm_hed")
    found = compared_parameters(model, "layers.0.mlp")
    assert [name.split(".")[-2] for name in found] == ["gate_proj", "up_proj", "down_proj"]
    capture = GradientCapture(list(found.values()))
    with capture.arm(0):
        loss(model, ids).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in found.values()])
    torch.testing.assert_close(capture.take(0), expected)
