import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.mixing.gradients import GradientCapture, named_parameters, output_head
from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN
from stillhouse.spec import ModelSettings
from stillhouse.training.cross_entropy import NextTokenLoss

VOCAB = 64


def small(tie=False):
    given = {"hidden_size": 32, "num_layers": 1, "tie_embeddings": tie}
    settings = ModelSettings.model_validate(given)
    return build_model(settings, vocab_size=VOCAB, sequence_length=16, seed=0, eos_id=0)


def batches(count):
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (4, 16), generator=rng) for _ in range(count)]


def loss(model, ids):
    return NextTokenLoss(0.0, PLAIN)(model, ids).objective


def head_gradient(model, ids):
    """Of one batch alone, flat."""
    (gradient,) = torch.autograd.grad(loss(model, ids), [model.get_output_embeddings().weight])
    return gradient.flatten()


@pytest.mark.parametrize("tie", [False, True])
def test_each_arm_gets_its_own_and_training_accumulates(tie):
    model, data = small(tie), batches(3)
    alone = [head_gradient(model, ids) for ids in data]
    capture = GradientCapture(output_head(model))
    for arm, ids in zip([7, 2, 7], data, strict=True):
        with capture.arm(arm):
            loss(model, ids).backward()
    torch.testing.assert_close(capture.total(7), alone[0] + alone[2])
    torch.testing.assert_close(capture.total(2), alone[1])
    weight = model.get_output_embeddings().weight
    torch.testing.assert_close(weight.grad.flatten(), sum(alone))


def test_a_small_gradient_survives_a_large_one_in_bfloat16():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    capture = GradientCapture({"weight": weight})
    small_one = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    with capture.arm(0):
        (weight * 1024).sum().backward()
    with capture.arm(1):
        (weight * small_one).sum().backward()
    difference = weight.grad - 1024  # what the published code would see: 1024 + 3 has no digits
    assert difference.tolist() == [0, 0, 0]
    assert capture.total(1).tolist() == [1, 2, 3]
    assert capture.total(1).dtype == torch.float32


def test_outside_an_arm_nothing_is_kept():
    model, data = small(), batches(2)
    capture = GradientCapture(output_head(model))
    loss(model, data[0]).backward()
    assert not capture.total(1).any()
    with capture.arm(1):
        loss(model, data[1]).backward()
    assert capture.total(1).any()
    capture.drop(1)
    assert not capture.total(1).any()
    capture.close()
    with capture.arm(1):
        loss(model, data[1]).backward()
    assert not capture.total(1).any()


def test_several_parameters_lie_one_after_the_other():
    model, (ids,) = small(), batches(1)
    found = named_parameters(model, "layers.0.mlp")
    assert [name.split(".")[-2] for name in found] == ["gate_proj", "up_proj", "down_proj"]
    capture = GradientCapture(found)
    with capture.arm(0):
        loss(model, ids).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in found.values()])
    torch.testing.assert_close(capture.total(0), expected)


def test_unknown_parameters():
    with pytest.raises(ModelError, match=r"contains 'lm_hed'.*lm_head"):
        named_parameters(small(), "lm_hed")


def test_the_head_is_found_tied_or_not():
    assert list(output_head(small())) == ["lm_head.weight"]
    assert list(output_head(small(tie=True))) == ["model.embed_tokens.weight"]
