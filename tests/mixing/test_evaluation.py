"""Batches of rows, their losses, and the few-shot target that models are evaluated on."""

import json

import numpy as np
import pytest
import torch

from stillhouse.errors import InputError
from stillhouse.mixing.arms import Row
from stillhouse.mixing.batches import (
    IGNORED,
    Collator,
    Slot,
    share,
    slots_of,
    spanning,
    token_losses,
)
from stillhouse.mixing.evaluation import TargetRow, choose_shots, evaluate, wilson
from stillhouse.models.causal_lm import save_model
from stillhouse.models.text_to_text import build_text_model, load_text_model
from stillhouse.spec import ModelSettings
from stillhouse.training.group import WorkerGroup

EOS, PAD = 0, 1
KINDS = (True, False)
"""Encoder-decoder, decoder."""


def nll(model, batch):
    return token_losses(model, batch)[0].sum(1)


def make(encoder_decoder, tie=False):
    settings = ModelSettings(hidden_size=32, num_layers=1, tie_embeddings=tie)
    return build_text_model(
        settings,
        encoder_decoder=encoder_decoder,
        vocab_size=64,
        num_positions=64,
        seed=0,
        eos_id=EOS,
        pad_id=PAD,
    )


def row(inputs, targets):
    return Row(np.array(inputs, np.int32), np.array(targets, np.int32))


def test_batches_of_both_kinds():
    rows = [row([5, 6, 7], [8]), row([9], [10, 11])]
    both = Collator(True, EOS, PAD)(rows)
    assert both.input_ids[:, :4].tolist() == [[5, 6, 7, 0], [9, 0, 1, 1]]
    assert both.attention_mask.sum(1).tolist() == [4, 2]
    assert both.labels[:, :3].tolist() == [[8, 0, IGNORED], [10, 11, 0]]
    one = Collator(False, EOS, PAD)(rows)
    assert one.input_ids[:, :5].tolist() == [[5, 6, 7, 8, 0], [9, 10, 11, 0, 1]]
    assert one.labels[0, :5].tolist() == [IGNORED, IGNORED, IGNORED, 8, 0]
    assert one.input_ids.shape[1] == 8


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_losses_of_rows_do_not_depend_on_the_batch(kind):
    model, collate = make(kind), Collator(kind, EOS, PAD)
    rows = [row([5, 6, 7], [8]), row([9] * 12, [10, 11, 12])]
    together, mask = token_losses(model, collate(rows))
    alone = torch.cat([nll(model, collate([r])) for r in rows])
    assert together.sum(1).tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    assert mask.sum(1).tolist() == [2, 4]


@torch.no_grad()
def test_the_encoder_decoders_loss_is_the_models_own():
    model, collate = make(True), Collator(True, EOS, PAD)
    batch = collate([row([5, 6], [8, 9]), row([7], [3])])
    own = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    assert float(nll(model, batch).sum()) / 5 == pytest.approx(float(own), rel=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_an_encoder_decoder_is_saved_and_loaded(tmp_path, tie):
    model = make(True, tie)
    save_model(model, tmp_path)
    # what transformers 4.x makes of it: it ties and scales outputs where this is not false
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tie
    again = load_text_model(str(tmp_path), encoder_decoder=True, device=torch.device("cpu"))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tie
    batch = Collator(True, EOS, PAD)([row([5, 6], [8, 9])])
    assert torch.equal(nll(model, batch), nll(again, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_with_the_least_mean_loss_wins(kind):
    model, collate = make(kind), Collator(kind, EOS, PAD)
    options = (np.array([8], np.int32), np.array([9, 10, 11], np.int32))
    losses = []
    with torch.no_grad():
        for option in options:
            batch = collate([row([5, 6], option)])
            losses.append(float(nll(model, batch)) / (len(option) + 1))
    best = int(np.argmin(losses))
    rows = [TargetRow(row([5, 6], options[a]), options, a) for a in (best, 1 - best, best)]
    found = evaluate(model, collate, rows, device=torch.device("cpu"), group=WorkerGroup())
    assert found.accuracy == pytest.approx(2 / 3) and found.num_rows == 3
    assert found.interval == pytest.approx(wilson(2, 3))
    assert found.chance == 0.5
    third = TargetRow(row([5, 6], [8]), (*options, np.array([12], np.int32)), 0)
    mixed = evaluate(
        model, collate, [*rows, third], device=torch.device("cpu"), group=WorkerGroup()
    )
    assert mixed.chance == pytest.approx((3 / 2 + 1 / 3) / 4)
    free = [TargetRow(row([5, 6], [8]), (), -1)]
    told = evaluate(model, collate, free, device=torch.device("cpu"), group=WorkerGroup())
    assert told.accuracy is None and told.chance is None and told.nll == told.score


def test_wilsons_interval():
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


def test_shots_are_halved_and_the_test_split_stays_apart():
    rows = [TargetRow(row([i], [i]), (), -1) for i in range(12)]
    splits = ["train"] * 8 + ["test"] * 4
    shots = choose_shots(rows, splits, num_shots=5, seed=0)
    assert (len(shots.train), len(shots.validation), len(shots.test)) == (3, 2, 4)
    seen = [int(r.row.input_ids[0]) for r in shots.train + shots.validation]
    assert len(set(seen)) == 5 and max(seen) < 8
    assert shots != choose_shots(rows, splits, num_shots=5, seed=1)
    with pytest.raises(InputError, match=r"8 rows .* fewer than `target\.num_shots` 9"):
        choose_shots(rows, splits, num_shots=9, seed=0)
    with pytest.raises(InputError, match="nothing to measure"):
        choose_shots(rows[:8], splits[:8], num_shots=2, seed=0)


def test_slots_are_dealt_whole_in_the_order_of_arms():
    slots = slots_of([4, 2, 4, 9, 2], {4: 10})
    assert slots == [Slot(2, 1, 0), Slot(2, 4, 1), Slot(4, 0, 10), Slot(4, 2, 11), Slot(9, 3, 0)]
    assert [list(share(5, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3, 4]]
    assert spanning(slots, 1) == [] and spanning(slots, 2) == [] and spanning(slots, 3) == [2, 4]
