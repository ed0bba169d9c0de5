import json
from pathlib import Path

import numpy as np
import pytest

from stillhouse.selection.baselines import (
    dsir_tokens,
    gumbel,
    log_importance,
    log_ratios,
    ngram_buckets,
    ngram_counts,
    row_keys,
)
from stillhouse.selection.budget import top_k
from stillhouse.selection.color import color_score
from stillhouse.selection.rules import RankedRows, find_rule

VECTOR = json.loads((Path(__file__).parents[1] / "vectors/baselines_01_rho_dsir.json").read_text())
DSIR, EXPECTED = VECTOR["dsir"]["inputs"], VECTOR["dsir"]["outputs"]


@pytest.mark.parametrize("case", VECTOR["rho_loss"]["cases"])
def test_rho_reproduces_the_reference(case):
    inputs, outputs = case["inputs"], case["outputs"]
    losses = (np.float32(inputs[name]) for name in ("model_loss", "irreducible_loss"))
    kept = top_k({"": color_score(*losses)}, k=inputs["select"])[""]
    assert np.flatnonzero(kept).tolist() == sorted(outputs["selected"])


def test_dsir_tokens_and_buckets_reproduce_the_reference():
    assert dsir_tokens(DSIR["raw_texts"][0]) == EXPECTED["tokens_of_first"]
    lengths = [len(dsir_tokens(text)) for text in DSIR["raw_texts"]]
    assert lengths == EXPECTED["raw_token_length_estimate"]
    for num_buckets, key in ((64, "bucket_of"), (10_000, "bucket_of_10000")):
        for gram, bucket in EXPECTED[key].items():
            assert ngram_buckets(gram, num_buckets)[-1] == bucket


def test_dsir_counts_reproduce_the_reference():
    for side in ("raw", "target"):
        counts = [ngram_counts(text, 64).tolist() for text in DSIR[f"{side}_texts"]]
        assert counts == EXPECTED[f"{side}_counts"]


@pytest.mark.parametrize("case", EXPECTED["importance"])
def test_dsir_weights_reproduce_the_reference(case):
    target, raw = (
        sum(ngram_counts(text, 64) for text in DSIR[f"{side}_texts"]) for side in ("target", "raw")
    )
    ratios = log_ratios(target, raw, case["laplace_smoothing"])
    weights = [log_importance(text, ratios) for text in DSIR["raw_texts"]]
    np.testing.assert_allclose(weights, case["log_importance_weights"], rtol=0, atol=1e-9)
    assert np.argsort(-np.array(weights)).tolist() == case["rank_best_to_worst"]


def test_texts_without_words_weigh_nothing():
    assert ngram_counts("  \n", 8).tolist() == [0] * 8
    assert log_importance("", np.ones(8)) == 0.0
    assert len(ngram_buckets("\ud800 x")) == 3


def test_gumbel_noise_has_the_distribution_of_its_name():
    noise = gumbel(row_keys("part", 50_000), seed=3)
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)


def random_values(part, count, seed):
    rows = RankedRows(np.full(count, 8), row_keys(part, count), seed)
    return find_rule("train.controls", "random").values({}, rows)


def test_random_values_depend_on_part_row_and_seed_only():
    values = random_values("part", 1000, 0)
    assert values.dtype == np.float32 and values.min() > 0 and values.max() <= 1
    assert np.array_equal(values[:10], random_values("part", 10, 0))
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    for other in (random_values("other", 1000, 0), random_values("part", 1000, 1)):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.1
