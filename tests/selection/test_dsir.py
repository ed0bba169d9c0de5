import json

import numpy as np
import pytest
from vector_cases import VECTORS

from stillhouse.selection.dsir import (
    gumbel,
    log_importance,
    log_ratios,
    ngram_buckets,
    ngram_counts,
)
from stillhouse.selection.ranking import row_keys
from stillhouse.selection.rules import RankedRows, find_rule

DSIR = json.loads((VECTORS / "baselines_01_rho_dsir.json").read_text())["dsir"]
TEXTS, EXPECTED = DSIR["inputs"], DSIR["outputs"]


def test_tokens_buckets_and_counts_reproduce_the_reference():
    lengths = [(len(ngram_buckets(text)) + 1) // 2 for text in TEXTS["raw_texts"]]
    assert lengths == EXPECTED["raw_token_length_estimate"]
    for num_buckets, key in ((64, "bucket_of"), (10_000, "bucket_of_10000")):
        for gram, bucket in EXPECTED[key].items():
            assert ngram_buckets(gram, num_buckets)[-1] == bucket
    for side in ("raw", "target"):
        counts = [ngram_counts(text, 64).tolist() for text in TEXTS[f"{side}_texts"]]
        assert counts == EXPECTED[f"{side}_counts"]


@pytest.mark.parametrize("case", EXPECTED["importance"])
def test_weights_reproduce_the_reference(case):
    target, raw = (
        sum(ngram_counts(text, 64) for text in TEXTS[f"{side}_texts"]) for side in ("target", "raw")
    )
    ratios = log_ratios(target, raw, case["laplace_smoothing"])
    weights = [log_importance(text, ratios) for text in TEXTS["raw_texts"]]
    np.testing.assert_allclose(weights, case["log_importance_weights"], rtol=0, atol=1e-9)
    assert np.argsort(-np.array(weights)).tolist() == case["rank_best_to_worst"]


def test_texts_without_words_weigh_nothing():
    assert ngram_counts("  \n", 8).tolist() == [0] * 8
    assert log_importance("", np.ones(8)) == 0.0
    assert len(ngram_buckets("\ud800 x")) == 3


def test_noise_is_gumbel_distributed():
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
