import math
from typing import Any

import numpy as np
import pytest
import torch
from training_parts import same, small_model
from trainings import Sequences
from transformers import PreTrainedModel

from stillhouse.errors import DivergedError
from stillhouse.spec import Optimisation
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.objectives import LossValue, Objective, ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.order import NO_SAMPLES, chain
from stillhouse.training.stream import Batch, TokenSources

CPU = torch.device("cpu")
LENGTH, BATCH, STEPS = 12, 4, 6
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def source(signals: dict | None = None) -> Sequences:
    """Sequences that count upwards: easy to learn."""
    starts = np.random.default_rng(0).integers(0, 64, (10, 1))
    ids = ((starts + np.arange(LENGTH)) % 64).astype(np.uint16)
    return Sequences(ids, batch_size=BATCH, seed=3, signals=signals)


def settings(**changes: object) -> Optimisation:
    return Optimisation.model_validate({"learning_rate": 1e-2, "global_batch": BATCH, **changes})


def trainer(seed: int = 0, batches: Any = None, objective: Any = None, **changes: Any) -> Trainer:
    """A trainer of six steps; `changes` to its settings."""
    options: dict[str, Any] = {"device": CPU, "num_steps": STEPS, "objective": objective}
    options |= {n: changes.pop(n) for n in ("num_steps", "stop_on_explosion") if n in changes}
    return Trainer(small_model(seed), batches or source(), settings(**changes), **options)


def train(device: torch.device = CPU, **changes: object) -> list[StepRecord]:
    """Sixty steps."""
    run = Trainer(small_model(), source(), settings(**changes), device=device, num_steps=60)
    return [run.step() for _ in range(60)]


def test_it_learns_and_records() -> None:
    records = train()
    assert [record.step for record in records] == list(range(1, 61))
    assert records[0].loss == pytest.approx(math.log(64), abs=0.1)
    assert records[-1].loss < 2.0
    last = records[-1]
    assert last.tokens == 60 * BATCH * LENGTH
    assert last.learning_rate == pytest.approx(1e-3)
    assert last.grad_norm > 0 and last.tokens_per_s > 0


def test_resumed_at_every_step_it_has_the_same_bits() -> None:
    """At step 0 too: equal inputs give equal bits."""
    whole = trainer()
    states = [whole.snapshot()]
    losses: list[float] = []
    for _ in range(STEPS):
        losses.append(whole.step().loss)
        states.append(whole.snapshot())
    for cut in range(STEPS + 1):
        resumed = trainer(seed=1)
        resumed.restore(states[cut])
        assert [resumed.step().loss for _ in range(STEPS - cut)] == losses[cut:]
        assert same(resumed.snapshot(), states[-1]), f"resumed after step {cut}"


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
    run = trainer(max_grad_norm=1e-12)
    norm = run._model.model.norm.weight
    before = norm.detach().clone()
    assert run.step().grad_norm > 1e-3
    # AdamW divides by the gradient's size, so only eps makes tiny gradients tiny steps
    assert (norm - before).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_names_the_step(bad: float) -> None:
    run = trainer()
    run.step(), run.step()
    with torch.no_grad():
        run._model.model.embed_tokens.weight[:] = bad
    with pytest.raises(DivergedError, match=r"step 3 of 6: loss nan.*learning_rate"):
        run.step()


def test_bfloat16_trains_on_the_cpu() -> None:
    assert train(dtype="bfloat16")[-1].loss < 2.0


def fussy(most: int, error: type[BaseException]):
    """An objective that runs out of memory with more than `most` sequences."""

    def make(facts: ObjectiveFacts) -> Objective:
        plain = CrossEntropy(facts)

        def loss(held: PreTrainedModel, input_ids: torch.Tensor, signals: Any) -> LossValue:
            value = plain(held, input_ids, signals)
            if len(input_ids) > most:
                raise error("no memory left")
            return value

        return loss

    return make


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_micro_batch(error: type[BaseException]) -> None:
    whole = trainer(micro_batch=1)
    held = trainer(objective=fussy(1, error))
    records = [held.step() for _ in range(STEPS)]
    assert [record.loss for record in records] == [whole.step().loss for _ in range(STEPS)]
    assert {record.micro_batch for record in records} == {1}
    assert records[-1].tokens == STEPS * BATCH * LENGTH
    resumed = trainer()
    resumed.restore(held.snapshot())
    assert resumed.step().micro_batch == 1


def test_out_of_memory_with_one_sequence_says_what_to_do() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer(objective=fussy(0, torch.OutOfMemoryError)).step()
    said = "step 1 with 1 rows a forward pass: lower `micro_batch`"
    assert said in caught.value.__notes__[0]


class Labelled(Sequences):
    """Batches whose first two positions are of one source, and the rest of another."""

    def next_batch(self) -> Batch:
        batch = super().next_batch()
        codes = np.ones(batch.inputs.shape, np.int32)
        codes[:, :2] = 0
        return Batch(batch.inputs, batch.samples, TokenSources(codes, ("sea", "law")))


def labelled() -> Labelled:
    return Labelled(source()._ids, batch_size=BATCH, seed=3)


def test_losses_by_source_add_up_to_the_loss() -> None:
    run = trainer(batches=labelled())
    record = run.step()
    found = run.take_source_losses()
    assert {name: loss.num_tokens for name, loss in found.items()} == {
        "sea": BATCH,  # the first position is not predicted
        "law": BATCH * (LENGTH - 2),
    }
    total = sum(loss.nll * loss.num_tokens for loss in found.values())
    assert total / (BATCH * (LENGTH - 1)) == pytest.approx(record.loss, rel=1e-6)
    assert run.take_source_losses() == {}


def test_an_explosion_names_step_and_sources() -> None:
    options = {"num_steps": 50, "stop_on_explosion": True}
    run = trainer(batches=labelled(), learning_rate=1e-4, **options)
    for _ in range(25):
        run.step()
    with torch.no_grad():
        run._model.model.embed_tokens.weight.mul_(100)
    with pytest.raises(DivergedError, match=r"step 26 of 50: loss .* after a mean of 4.*law, sea"):
        run.step()


def test_times_and_order_of_a_step() -> None:
    run = trainer()
    record = run.step()
    assert 0 <= record.data_wait_s <= record.seconds
    assert record.tokens_per_s == pytest.approx(BATCH * LENGTH / record.seconds)
    assert record.mfu is None  # a CPU has no known peak
    assert run.order_sha256 == chain(NO_SAMPLES, source().next_batch().samples).hex()


@GPU
def test_model_flops_utilisation_on_a_gpu() -> None:
    cuda = torch.device("cuda")
    run = Trainer(small_model(), source(), settings(compile="off"), device=cuda, num_steps=STEPS)
    assert 0 < (run.step().mfu or 0) < 1


@GPU
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_on_a_gpu(compiled: str) -> None:
    assert train(torch.device("cuda"), compile=compiled)[-1].loss < 2.0


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_a_mask_gives_the_mean_over_marked_tokens_of_the_whole_batch(
    micro_batch: int | None,
) -> None:
    """However the batch is split, and though its sequences have 0 to 11 marked tokens."""
    mask = np.arange(LENGTH) >= np.arange(10)[:, None] + 2
    batch = source({"loss_mask": mask}).next_batch()
    logits = small_model()(input_ids=batch.inputs).logits[:, :-1]
    kept = batch.signals["loss_mask"][:, 1:].bool()
    expected = torch.nn.functional.cross_entropy(logits[kept], batch.inputs[:, 1:][kept])
    run = trainer(batches=source({"loss_mask": mask}), micro_batch=micro_batch)
    assert run.step().loss == pytest.approx(float(expected.detach()), rel=1e-5)
