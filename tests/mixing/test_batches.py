"""Batches of rows, their losses, and the few-shot target that models are evaluated on."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from stillhouse.errors import InputError
from stillhouse.mixing.arms import Row
from stillhouse.mixing.batches import (
    IGNORED,
    Collator,
    Slot,
    choose_shots,
    evaluate,
    share,
    shared_arms,
    slots_of,
    token_losses,
    wilson,
)
from stillhouse.mixing.preparation import TARGET_SCHEMA
from stillhouse.models.causal_lm import save_model
from stillhouse.models.text_to_text import build_text_model, load_text_model
from stillhouse.spec import ModelSettings
from stillhouse.training.group import WorkerGroup

EOS, PAD = 0, 1
CPU = torch.device("cpu")


def nll(model, *rows):
    collate = Collator(model.config.is_encoder_decoder, EOS, PAD)
    with torch.no_grad():
        return token_losses(model, collate(rows))[0].sum(1)


def make(encoder_decoder, tie=False):
    return build_text_model(
        ModelSettings(hidden_size=32, num_layers=1, tie_embeddings=tie),
        encoder_decoder=encoder_decoder,
        vocab_size=64,
        num_positions=64,
        seed=0,
        eos_id=EOS,
        pad_id=PAD,
    )


def row(inputs, targets, choices=(), answer=-1):
    return Row(np.array(inputs, np.int32), np.array(targets, np.int32), choices, answer)


def test_batches_of_both_kinds():
    rows = [row([5, 6, 7], [8]), row([9], [10, 11])]
    both = Collator(True, EOS, PAD)(rows)
    assert both["input_ids"][:, :4].tolist() == [[5, 6, 7, 0], [9, 0, 1, 1]]
    assert both["attention_mask"].sum(1).tolist() == [4, 2]
    assert both["labels"][:, :3].tolist() == [[8, 0, IGNORED], [10, 11, 0]]
    one = Collator(False, EOS, PAD)(rows)
    assert one["input_ids"][:, :5].tolist() == [[5, 6, 7, 8, 0], [9, 10, 11, 0, 1]]
    assert one["labels"][0, :5].tolist() == [IGNORED, IGNORED, IGNORED, 8, 0]
    assert one["input_ids"].shape[1] == 8


def test_slots_are_divided_whole_in_the_order_of_arms():
    slots = slots_of([4, 2, 4, 9, 2], {4: 10})
    assert slots == [Slot(2, 1, 0), Slot(2, 4, 1), Slot(4, 0, 10), Slot(4, 2, 11), Slot(9, 3, 0)]
    assert [list(share(5, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3, 4]]
    assert [shared_arms(slots, size) for size in (1, 2, 3)] == [[], [], [2, 4]]


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_losses_of_rows_do_not_depend_on_the_batch(encoder_decoder):
    model = make(encoder_decoder)
    rows = [row([5, 6, 7], [8]), row([9] * 12, [10, 11, 12])]
    alone = torch.cat([nll(model, one) for one in rows])
    assert nll(model, *rows).tolist() == pytest.approx(alone.tolist(), rel=1e-5)


def test_the_encoder_decoders_loss_is_the_models_own():
    model, rows = make(True), [row([5, 6], [8, 9]), row([7], [3])]
    batch = Collator(True, EOS, PAD)(rows)
    with torch.no_grad():
        own = model(**batch).loss
    assert float(nll(model, *rows).sum()) / 5 == pytest.approx(float(own), rel=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_an_encoder_decoder_is_saved_and_loaded(tmp_path, tie):
    model = make(True, tie)
    save_model(model, tmp_path)
    # what transformers 4.x makes of it: it ties and scales outputs where this is not false
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tie
    again = load_text_model(str(tmp_path), encoder_decoder=True, device=CPU)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tie
    one = row([5, 6], [8, 9])
    assert torch.equal(nll(model, one), nll(again, one))


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_the_choice_with_the_least_mean_loss_wins(encoder_decoder):
    model, collate = make(encoder_decoder), Collator(encoder_decoder, EOS, PAD)

    def measure(*rows):
        return evaluate(model, collate, rows, device=CPU, group=WorkerGroup())

    options = (np.array([8], np.int32), np.array([9, 10, 11], np.int32))
    means = [float(nll(model, row([5, 6], ids))) / (len(ids) + 1) for ids in options]
    best = int(np.argmin(means))
    rows = [row([5, 6], options[a], options, a) for a in (best, 1 - best, best)]
    found = measure(*rows)
    assert found.accuracy == pytest.approx(2 / 3) and found.num_rows == 3
    assert found.interval == pytest.approx(wilson(2, 3)) and found.chance == 0.5
    third = row([5, 6], [8], (*options, np.array([12], np.int32)), 0)
    assert measure(*rows, third).chance == pytest.approx((3 / 2 + 1 / 3) / 4)
    free = measure(row([5, 6], [8]))
    assert free.accuracy is None and free.chance is None and free.nll == free.score


def test_wilsons_interval():
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


def test_shots_are_halved_and_the_test_split_is_kept_out():
    splits = ["train"] * 8 + ["test"] * 4
    rows = [{"input_ids": [i], "target_ids": [i], "split": s} for i, s in enumerate(splits)]
    target = pa.Table.from_pylist(rows, schema=TARGET_SCHEMA)
    shots = choose_shots(target, num_shots=5, seed=0)
    assert (len(shots.train), len(shots.validation), len(shots.test)) == (3, 2, 4)
    seen = [int(r.input_ids[0]) for r in shots.train + shots.validation]
    assert len({*seen}) == 5 and max(seen) < 8
    other = choose_shots(target, num_shots=5, seed=1)
    assert seen != [int(r.input_ids[0]) for r in other.train + other.validation]
    with pytest.raises(InputError, match=r"8 rows .* fewer than `target\.num_shots` 9"):
        choose_shots(target, num_shots=9, seed=0)
    with pytest.raises(InputError, match="nothing to measure"):
        choose_shots(target[:8], num_shots=2, seed=0)
