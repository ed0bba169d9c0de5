import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from stillhouse.errors import DivergedError
from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.training.batches import TokenBatches
from stillhouse.training.cross_entropy import LossValue, NextTokenLoss
from stillhouse.training.loop import Trainer, train

CPU = torch.device("cpu")
LENGTH, BATCH, STEPS = 12, 4, 6
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model(seed: int = 0) -> PreTrainedModel:
    settings = ModelSettings(hidden_size=32, num_layers=1)
    return build_model(settings, vocab_size=64, sequence_length=LENGTH, seed=seed, eos_id=0)


def source(batch_size: int = BATCH) -> TokenBatches:
    """Sequences that count upwards: easy to learn."""
    starts = np.random.default_rng(0).integers(0, 64, (10, 1))
    ids = ((starts + np.arange(LENGTH)) % 64).astype(np.uint16)
    return TokenBatches(ids, batch_size=batch_size, seed=3)


def settings(**changes: object) -> Optimisation:
    return Optimisation.model_validate({"learning_rate": 1e-2, "global_batch": BATCH, **changes})


def trainer(seed: int = 0, **changes: object) -> Trainer:
    chosen = settings(**changes)
    return Trainer(model(seed), source(), chosen, device=CPU, num_steps=STEPS)


def test_it_learns_and_records() -> None:
    seen: list[int] = []
    result = train(model(), source(), settings(), device=CPU, num_steps=60, on_step=seen.append)
    assert seen == list(range(1, 61))
    assert result.losses[0] == pytest.approx(math.log(64), abs=0.1)
    assert result.losses[-1] < 2.0
    last = result.records[-1]
    assert (last.step, last.tokens) == (60, 60 * BATCH * LENGTH)
    assert last.learning_rate == pytest.approx(1e-3)
    assert last.grad_norm > 0 and last.tokens_per_s > 0


def test_same_inputs_same_bits() -> None:
    first, again = trainer(), trainer()
    records = [first.step() for _ in range(STEPS)], [again.step() for _ in range(STEPS)]
    assert [r.loss for r in records[0]] == [r.loss for r in records[1]]
    assert first.state_dict() == again.state_dict()


def test_resumed_at_every_step_gives_the_same_bits() -> None:
    whole = trainer()
    states = [whole.state_dict()]
    losses: list[float] = []
    for _ in range(STEPS):
        losses.append(whole.step().loss)
        states.append(whole.state_dict())
    for cut in range(STEPS + 1):
        resumed = trainer(seed=1)
        resumed.load_state_dict(states[cut])
        assert [resumed.step().loss for _ in range(STEPS - cut)] == losses[cut:]
        assert resumed.state_dict() == states[-1], f"resumed after step {cut}"


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_add_up_to_the_global_batch(micro_batch: int) -> None:
    whole, split = trainer(), trainer(micro_batch=micro_batch)
    for _ in range(3):
        one, other = whole.step(), split.step()
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_the_z_loss_is_trained_on_but_not_reported() -> None:
    plain, with_z = trainer(z_loss=0), trainer(z_loss=1.0)
    one, other = plain.step(), with_z.step()
    assert one.loss == other.loss
    assert other.grad_norm > 1.5 * one.grad_norm


def test_gradients_are_clipped() -> None:
    held = model()
    run = Trainer(held, source(), settings(max_grad_norm=1e-12), device=CPU, num_steps=STEPS)
    before = held.model.norm.weight.detach().clone()
    assert run.step().grad_norm > 1e-3
    # AdamW divides by the gradient's size, so eps alone makes tiny gradients tiny steps
    assert (held.model.norm.weight - before).abs().max() < 1e-5


def test_a_loss_of_the_callers_own() -> None:
    def doubled(held: PreTrainedModel, input_ids: torch.Tensor) -> LossValue:
        value = NextTokenLoss(0.0)(held, input_ids)
        return LossValue(value.objective * 2, value.nll * 2)

    def first(**options: object) -> float:
        run = Trainer(model(), source(), settings(z_loss=0), device=CPU, num_steps=STEPS, **options)
        return run.step().loss

    assert first(loss=doubled) == pytest.approx(2 * first())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_names_the_step(bad: float) -> None:
    held = model()

    def spoil(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                held.model.embed_tokens.weight[:] = bad

    with pytest.raises(DivergedError, match=r"step 3 of 6: loss nan.*learning_rate"):
        train(held, source(), settings(), device=CPU, num_steps=STEPS, on_step=spoil)


def test_bfloat16_trains_on_the_cpu() -> None:
    run = settings(dtype="bfloat16")
    result = train(model(), source(), run, device=CPU, num_steps=60)
    assert result.losses[-1] < 2.0


@GPU
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_on_a_gpu(compiled: str) -> None:
    run = settings(compile=compiled)
    result = train(model(), source(), run, device=torch.device("cuda"), num_steps=60)
    assert result.losses[-1] < 2.0
