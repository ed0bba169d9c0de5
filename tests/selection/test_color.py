import json

import numpy as np
import pytest
import torch
from vector_cases import VECTORS

from stillhouse.selection.budget import top_k
from stillhouse.selection.color import color_score, piece_sums, token_nll

VECTOR = json.loads((VECTORS / "color_filter_01_sequence_score.json").read_text())
RHO_LOSS = json.loads((VECTORS / "baselines_01_rho_dsir.json").read_text())["rho_loss"]


@pytest.mark.parametrize("model", ["prior", "cond"])
def test_losses_reproduce_the_reference(model):
    ids = torch.tensor(VECTOR["inputs"]["input_ids"])
    losses = token_nll(torch.tensor(VECTOR["inputs"][f"{model}_logits"]), ids)
    assert losses.dtype == torch.float32
    tolerance = {"rtol": 0, "atol": VECTOR["tolerance"]["abs"]}
    for name, found in (("token_loss", losses), ("score", losses.mean(-1))):
        expected = torch.tensor(VECTOR["outputs"][f"{model}_{name}"])
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("make", [np.float32, torch.tensor])
def test_score_and_ranking_reproduce_the_reference(make):
    outputs = VECTOR["outputs"]
    score = color_score(make(outputs["prior_score"]), make(outputs["cond_score"]))
    assert str(score.dtype).endswith("float32")
    np.testing.assert_allclose(np.asarray(score), outputs["color_score"], rtol=0, atol=2e-6)
    best_first = np.argsort(-np.asarray(score), kind="stable")
    index = np.array(VECTOR["inputs"]["index"])[best_first]
    assert index.tolist() == outputs["rank_best_to_worst_index"]


@pytest.mark.parametrize("case", RHO_LOSS["cases"])
def test_rho_loss_reproduces_the_reference(case):
    inputs, outputs = case["inputs"], case["outputs"]
    losses = (np.float32(inputs[name]) for name in ("model_loss", "irreducible_loss"))
    kept = top_k({"": color_score(*losses)}, k=inputs["select"])[""]
    assert np.flatnonzero(kept).tolist() == sorted(outputs["selected"])


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = torch.tensor([[[300.0, 299.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    nll = token_nll(logits, torch.tensor([[0, 1]], dtype=torch.int32))
    expected = float(np.log1p(np.exp(1 if logits[0, 0, 0] > logits[0, 0, 1] else 0)))
    assert nll.tolist() == [[pytest.approx(expected, abs=1e-6)]]


@pytest.mark.parametrize(
    ("pieces", "sums", "counts"),  # pieces: row, start, end
    [
        ([[0, 0, 2], [0, 2, 4], [1, 0, 1], [1, 1, 4]], [1, 6, 0, 48 + np.nan], [1, 2, 0, 3]),
        ([[0, 2, 4], [0, 0, 2]], [6, 1], [2, 1]),
        ([[1, 0, 2], [1, 3, 4]], [8, 32], [1, 1]),  # a NaN stays in its own piece
        (np.zeros((0, 3), int), [], []),
    ],
)
def test_piece_sums(pieces, sums, counts):
    nll = np.float32([[1, 2, 4], [8, np.nan, 32]])  # positions 1, 2, 3 of two sequences
    found, tokens = piece_sums(nll, *np.array(pieces).T)
    np.testing.assert_array_equal(found, np.float32(sums))
    assert tokens.tolist() == counts
    assert found.dtype == np.float32 and tokens.dtype == np.int32
