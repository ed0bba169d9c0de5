import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.selection.color import color_score, piece_sums, token_nll

VECTOR = json.loads(
    (Path(__file__).parents[1] / "vectors/color_filter_01_sequence_score.json").read_text()
)


@pytest.mark.parametrize("model", ["prior", "cond"])
def test_losses_reproduce_the_reference(model):
    ids = torch.tensor(VECTOR["inputs"]["input_ids"])
    logits = torch.tensor(VECTOR["inputs"][f"{model}_logits"])
    expected = VECTOR["outputs"]
    tokens = token_nll(logits, ids)
    assert tokens.dtype == torch.float32
    tolerance = {"rtol": 0, "atol": VECTOR["tolerance"]["abs"]}
    torch.testing.assert_close(tokens, torch.tensor(expected[f"{model}_token_loss"]), **tolerance)
    torch.testing.assert_close(
        tokens.mean(-1), torch.tensor(expected[f"{model}_score"]), **tolerance
    )


@pytest.mark.parametrize("make", [np.float32, torch.tensor])
def test_color_score_and_ranking_reproduce_the_reference(make):
    outputs = VECTOR["outputs"]
    score = color_score(make(outputs["prior_score"]), make(outputs["cond_score"]))
    assert str(score.dtype).endswith("float32")
    np.testing.assert_allclose(np.asarray(score), outputs["color_score"], rtol=0, atol=2e-6)
    best_first = np.argsort(-np.asarray(score), kind="stable")
    index = np.array(VECTOR["inputs"]["index"])[best_first]
    assert index.tolist() == outputs["rank_best_to_worst_index"]


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = torch.tensor([[[300.0, 299.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    nll = token_nll(logits, torch.tensor([[0, 1]], dtype=torch.int32))
    expected = float(np.log1p(np.exp(1 if logits[0, 0, 0] > logits[0, 0, 1] else 0)))
    assert nll.tolist() == [[pytest.approx(expected, abs=1e-6)]]


def test_piece_sums_of_a_hand_made_batch():
    nll = np.float32([[1, 2, 4], [8, 16, 32]])  # positions 1, 2, 3 of two sequences
    row, start, end = np.array([[0, 0, 2], [0, 2, 4], [1, 0, 1], [1, 1, 4]]).T
    sums, tokens = piece_sums(nll, row, start, end)
    assert sums.tolist() == [1, 6, 0, 56]
    assert tokens.tolist() == [1, 2, 0, 3]
    assert sums.dtype == np.float32 and tokens.dtype == np.int32


def test_piece_sums_keep_a_nan_to_its_own_piece():
    nll = np.float32([[1, np.nan, 4]])
    sums, _ = piece_sums(nll, np.zeros(3, int), np.array([0, 2, 3]), np.array([2, 3, 4]))
    np.testing.assert_array_equal(sums, np.float32([1, np.nan, 4]))


def test_piece_sums_in_any_order_and_of_nothing():
    nll = np.float32([[1, 2, 4]])
    sums, tokens = piece_sums(nll, np.zeros(2, int), np.array([2, 0]), np.array([4, 2]))
    assert (sums.tolist(), tokens.tolist()) == ([6, 1], [2, 1])
    empty = np.zeros(0, dtype=np.int32)
    assert [len(array) for array in piece_sums(nll, empty, empty, empty)] == [0, 0]
