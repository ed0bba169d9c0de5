"""Masked language models: which tokens are hidden, the losses, and self-distillation."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from masked_parts import CLS_ID, CONFIGS, MASK_ID, tiny_masked
from torch.nn.functional import cross_entropy
from training_parts import (
    LENGTH,
    VOCAB,
    check_resumed,
    make_trainer,
    small_model,
    steps,
    write_parts,
)

from stillhouse.errors import SpecError
from stillhouse.training.group import WorkerGroup
from stillhouse.training.hiding import GIVEN, Hiding
from stillhouse.training.objectives import make_objective
from stillhouse.training.spec import ObjectiveSettings
from stillhouse.training.stream import Batch

NUM = 5
CASES = {
    "plain": {"name": "masked_tokens", "rate": 0.4},
    "self": {"name": "self_distillation", "weight": 0.3, "rate": 0.4},
}


def teacher(seed=9, **sizes):
    return tiny_masked(vocab_size=VOCAB, seed=seed, **sizes)


def trainer(name, uris, group=None, *, model=None, teachers=(), **options):
    content = CASES[name] | ({"teachers": [{"path": "given"}]} if name == "self" else {})
    settings = ObjectiveSettings.model_validate(content)
    return make_trainer(
        uris,
        group,
        model=model or tiny_masked(vocab_size=VOCAB),
        objective=partial(make_objective, settings, None),
        teachers=teachers or ([teacher()] if name == "self" else []),
        bos_id=CLS_ID,
        vocab_size=VOCAB,
        mask_id=MASK_ID,
        **options,
    )


def batch_of(rows, length, seed=0, **signals):
    generator = np.random.default_rng(seed)
    ids = torch.from_numpy(generator.integers(5, 1000, (rows, length)))
    return Batch(ids, generator.integers(0, 50, (rows, 2)), None, signals)


def test_a_share_of_every_sequence_is_hidden():
    """As many in each; four in five by the mask token, one in ten by any other."""
    hiding, batch = Hiding(mask_id=4, vocab_size=1000), batch_of(2000, 101)
    made = hiding.in_batch(batch, seed=3, step=7)
    given, chosen = made.signals[GIVEN].numpy(), made.signals["loss_mask"].numpy()
    ids = batch.inputs.numpy()
    assert (chosen.sum(1) == 15).all() and (chosen[:, 0] == 0).all()
    assert set(np.unique(chosen)) == {0, 1}
    assert (given == ids)[chosen == 0].all()
    now, before = given[chosen == 1], ids[chosen == 1]
    masked = (now == 4).mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert (now == before).mean() == pytest.approx(0.1, abs=0.01)
    places = chosen.mean(0)[1:]  # every place is as likely: 0.15, with a deviation of 0.008
    assert places.min() > 0.11 and places.max() < 0.19


@given(st.integers(2, 12), st.integers(2, 40), st.floats(0.01, 0.99), st.data())
def test_masks_are_the_same_for_any_number_of_workers(rows, length, rate, data):
    """However a batch is split, and again: of seed, step and row alone."""
    batch = batch_of(rows, length)
    hiding = Hiding(4, 1000, rate)
    whole = hiding.in_batch(batch, 1, 2).signals
    cut = data.draw(st.integers(1, rows - 1))
    parts = [
        hiding.in_batch(Batch(batch.inputs[part], batch.samples[part]), 1, 2).signals
        for part in (slice(0, cut), slice(cut, rows))
    ]
    for name in (GIVEN, "loss_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    held, again = (hiding.held_out(batch.inputs) for _ in range(2))
    alone = hiding.held_out(batch.inputs[cut:])
    for one, other, part in zip(held, again, alone, strict=True):
        assert torch.equal(one, other) and torch.equal(one[cut:], part)


def test_another_step_seed_or_row_hides_others():
    hiding, batch = Hiding(4, 1000), batch_of(1, 400)
    shifted = Batch(batch.inputs, batch.samples + 1)
    made = [
        hiding.in_batch(one, seed, step).signals["loss_mask"]
        for one, seed, step in ((batch, 1, 2), (batch, 1, 3), (batch, 2, 2), (shifted, 1, 2))
    ]
    for i, one in enumerate(made):
        assert not any(torch.equal(one, other) for other in made[i + 1 :])


def test_only_what_a_loss_mask_marked_counts():
    answers = torch.zeros(3, 40)
    answers[:, 20:] = 1
    made = Hiding(4, 1000, 0.5).in_batch(batch_of(3, 40, loss_mask=answers), 0, 0)
    free = Hiding(4, 1000, 0.5).in_batch(batch_of(3, 40), 0, 0)
    assert torch.equal(made.signals["loss_mask"], free.signals["loss_mask"] * answers)
    assert torch.equal(made.signals[GIVEN], free.signals[GIVEN])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parts, and what two processes found."""
    folder = tmp_path_factory.mktemp("masked")
    uris = write_parts(folder)
    torch.multiprocessing.spawn(worker, (str(folder), uris), nprocs=2)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    return uris, found[0]


def worker(rank, folder, uris):
    """One of two processes: the losses and gradient norms of all cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: steps(trainer(name, uris, WorkerGroup.current()), NUM) for name in CASES}
    for name in CASES:
        group = WorkerGroup.current(sharded=True)
        found[f"{name} sharded"] = steps(trainer(name, uris, group, micro_batch=4), NUM)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*CASES])
def test_workers_and_micro_batches_change_no_losses(world, name):
    uris, found = world
    alone = steps(trainer(name, uris), NUM)
    again = steps(trainer(name, uris, micro_batch=4, activation_checkpointing=True), NUM)
    for other in (again, found[name], found[f"{name} sharded"]):
        assert [x[0] for x in other] == pytest.approx([x[0] for x in alone], rel=1e-5)
        assert [x[1] for x in other] == pytest.approx([x[1] for x in alone], rel=1e-3)
    assert alone[-1][0] != alone[0][0]


@pytest.mark.parametrize("name", [*CASES])
def test_resumed_it_has_the_same_bits(world, name):
    check_resumed(lambda: trainer(name, world[0]))


def test_compiled_layers_change_no_losses(world, monkeypatch):
    """Traced as for a GPU, of the student and of the teacher."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    alone, compiled = trainer("self", world[0]), trainer("self", world[0], compile="on")
    for one, other in zip(steps(alone, 3), steps(compiled, 3), strict=True):
        assert other == pytest.approx(one, rel=1e-3)


def own_losses(model, given, ids, chosen):
    """Of the chosen tokens, by all logits of the model as transformers has it."""
    cls = torch.full((len(given), 1), CLS_ID)
    logits = model(input_ids=torch.cat([cls, given], 1)).logits[:, 1:]
    return cross_entropy(logits[chosen], ids[chosen], reduction="none")


def first_state(model, ids):
    cls = torch.full((len(ids), 1), CLS_ID)
    return model.base_model(input_ids=torch.cat([cls, ids], 1)).last_hidden_state[:, 0]


def gradients(model):
    """By name; they are zeroed."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def parts_of(run):
    """The next batch of a trainer: tokens, what stands in their place, and which were chosen."""
    run._learner.at_step(0, 50)
    batch = run._learner.prepared(run._source.next_batch())
    return batch, batch.inputs, batch.signals[GIVEN], batch.signals["loss_mask"] > 0


@pytest.mark.parametrize("architecture", [*CONFIGS])
def test_losses_are_those_of_transformers(world, architecture):
    model = tiny_masked(architecture, vocab_size=VOCAB)
    run = trainer("plain", world[0], model=model)
    batch, ids, given, chosen = parts_of(run)
    assert chosen.sum() == 2 * len(ids)  # 0.4 of five
    model.train()
    value = run._learner(ids, batch.signals)
    value.objective.backward()
    found = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    model.zero_grad()
    losses = own_losses(model, given, ids, chosen)
    losses.mean().backward()
    torch.testing.assert_close(value.objective, losses.mean())
    torch.testing.assert_close(value.nll, losses.mean().detach())
    torch.testing.assert_close(value.token_nll[chosen[:, 1:]], losses.detach())
    assert not value.token_nll[~chosen[:, 1:]].any()
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


def test_self_distillation_adds_the_distance_of_cls_states(world):
    """Of whole sequences, the squares summed over the width, their mean over the batch."""
    model, known = tiny_masked(vocab_size=VOCAB), teacher()
    run = trainer("self", world[0], model=model, teachers=[known])
    batch, ids, given, chosen = parts_of(run)
    model.train()
    value = run._learner(ids, batch.signals)
    value.objective.backward()
    found = {
        name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }
    model.zero_grad()
    loss = own_losses(model, given, ids, chosen).mean()
    with torch.no_grad():
        theirs = first_state(known, ids)
    distance = ((first_state(model, ids) - theirs) ** 2).sum(-1).mean()
    (loss + 0.3 * distance).backward()
    assert float(distance.detach()) > 1
    torch.testing.assert_close(value.objective, loss + 0.3 * distance)
    torch.testing.assert_close(value.nll, loss.detach())
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-5)
    assert not known.training and not any(p.requires_grad for p in known.parameters())


@pytest.mark.parametrize("name", [*CASES])
def test_held_out_losses_hide_the_same_at_every_evaluation(world, name):
    run = trainer(name, world[0])
    ids = torch.randint(5, VOCAB, (7, LENGTH), generator=torch.Generator().manual_seed(0))
    before, marks = run.token_nll(ids.numpy()), run.counted(ids.numpy())
    given, chosen = Hiding(MASK_ID, VOCAB, 0.4).held_out(ids)
    assert np.array_equal(marks, chosen.numpy()) and (marks.sum(1) == 2).all()
    with torch.no_grad():
        wanted = own_losses(run._model, given, ids, chosen > 0)
    np.testing.assert_allclose(before[marks[:, 1:] > 0], wanted, rtol=1e-5)
    assert np.array_equal(run.token_nll(ids.numpy()), before)
    run.step()
    assert not np.array_equal(run.token_nll(ids.numpy()), before)
    assert np.array_equal(run.counted(ids.numpy()), marks)


def test_what_is_refused(world):
    with pytest.raises(SpecError, match="has states of width 48, the model 32"):
        trainer("self", world[0], teachers=[small_model_of(48)])
    for objective, mask_id, wanted in (
        ({"name": "cross_entropy"}, MASK_ID, "is of causal language models"),
        ({"name": "masked_tokens"}, None, "needs a masked language model as `init`"),
        ({"name": "masked_tokens", "rate": 1.0}, MASK_ID, "is not between 0 and 1"),
    ):
        made = partial(make_objective, ObjectiveSettings.model_validate(objective), None)
        model = small_model() if mask_id is None else tiny_masked(vocab_size=VOCAB)
        with pytest.raises(SpecError, match=wanted):
            make_trainer(world[0], model=model, objective=made, mask_id=mask_id, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="masked_tokens has `rate` alone"):
        ObjectiveSettings.model_validate({"name": "masked_tokens", "z_loss": 0.1})
    with pytest.raises(ValueError, match="has none; use `name: self_distillation`"):
        ObjectiveSettings.model_validate({"name": "masked_tokens", "teachers": [{"path": "a"}]})


def small_model_of(width):
    from transformers import AutoModelForMaskedLM, BertConfig

    return AutoModelForMaskedLM.from_config(
        BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB)
    )
