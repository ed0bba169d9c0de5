import json
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vector_cases import VECTORS

from stillhouse.errors import BudgetError
from stillhouse.selection import budget
from stillhouse.selection.budget import find_cut, find_weighted_cut, threshold_cut, top_k
from stillhouse.selection.color import color_score

VECTOR = json.loads((VECTORS / "color_filter_03_selection.json").read_text())

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, math.inf, -math.inf, math.nan, 1e-45])
near_values = st.integers(0, 40).map(lambda i: float(np.float32(1) + np.float32(i * 2.0**-23)))
any_values = st.floats(width=32) | few_values | near_values
columns = st.lists(any_values, max_size=12).map(lambda values: np.array(values, dtype=np.float32))
names = st.sampled_from([[10, 9, 2, 1], ["b", "a", "part-10", "part-9"]])


@st.composite
def pools(draw):
    chosen = draw(names)[: draw(st.integers(1, 4))]
    return {name: draw(columns) for name in chosen}


def loads(pool):
    return {name: partial(np.asarray, scores) for name, scores in pool.items()}


def in_order(pool):
    """All rows that are not NaN as (part, row), by one full sort of Python tuples."""
    rows = [(part, i) for part in pool for i in range(len(pool[part]))]
    rows = [(part, i) for part, i in rows if not math.isnan(pool[part][i])]
    return sorted(rows, key=lambda at: (-float(pool[at[0]][at[1]]), at[0], at[1]))


def kept(cut, pool):
    return {(p, int(i)) for p in pool for i in np.flatnonzero(cut.mask(p, pool[p]))}


def with_candidates(limit, function, *args):
    """Run with another bound, so that tiny pools take the paths of large ones."""
    usual = budget.MAX_CANDIDATES
    budget.MAX_CANDIDATES = limit
    try:
        return function(*args)
    finally:
        budget.MAX_CANDIDATES = usual


@settings(deadline=None, max_examples=100)
@given(pools(), st.data(), st.sampled_from([0, 2, 2**21]))
def test_the_cut_equals_a_full_sort(pool, data, limit):
    order = in_order(pool)
    assume(order)
    for k in {1, data.draw(st.integers(1, len(order))), len(order)}:
        cut = with_candidates(limit, find_cut, loads(pool), k)
        assert kept(cut, pool) == set(order[:k])
        assert (cut.part, cut.row) == order[k - 1]
        assert cut.score == pool[cut.part][cut.row]


@settings(deadline=None, max_examples=20)
@given(pools())
def test_a_size_outside_the_pool_is_refused(pool):
    num_rows = len(in_order(pool))
    for k in (-1, 0, num_rows + 1):
        with pytest.raises(BudgetError, match=rf"cannot keep {k} of {num_rows} "):
            find_cut(loads(pool), k)


@settings(deadline=None, max_examples=100)
@given(pools(), st.data(), st.sampled_from([0, 2, 2**21]))
def test_the_weighted_cut_equals_a_full_sort(pool, data, limit):
    weights = {
        part: np.array(
            data.draw(st.lists(st.integers(1, 9), min_size=len(s), max_size=len(s))), dtype=np.int64
        )
        for part, s in pool.items()
    }
    order = in_order(pool)
    sums = np.cumsum([0] + [weights[part][row] for part, row in order])
    parts = {part: partial(tuple, (pool[part], weights[part])) for part in pool}
    assume(order)
    for tokens in {data.draw(st.integers(1, int(sums[-1]))), int(sums[-1])}:
        num_fit = np.searchsorted(sums, tokens, side="right") - 1
        if num_fit == 0:
            with pytest.raises(BudgetError, match=f"exceeds the budget of {tokens} tokens"):
                with_candidates(limit, find_weighted_cut, parts, tokens)
        else:
            cut = with_candidates(limit, find_weighted_cut, parts, tokens)
            assert kept(cut, pool) == set(order[:num_fit])
    with pytest.raises(BudgetError, match=rf"cannot keep {sums[-1] + 1} tokens of {sums[-1]} "):
        find_weighted_cut(parts, int(sums[-1]) + 1)


@given(pools(), any_values.filter(lambda value: not math.isnan(value)))
def test_a_threshold_keeps_all_scores_from_it_up(pool, score):
    cut = threshold_cut(score)
    assert kept(cut, pool) == {(p, i) for p in pool for i, s in enumerate(pool[p]) if s >= score}


def test_large_parts_with_many_equal_scores():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(300_000).astype(np.float32).round(2)
    pool = {"a": scores[:140_000], "b": scores[140_000:]}
    order = np.argsort(-scores, kind="stable")
    for limit in (0, 2**21):
        cut = with_candidates(limit, find_cut, loads(pool), 100_000)
        mask = np.concatenate([cut.mask(part, pool[part]) for part in pool])
        assert np.array_equal(np.flatnonzero(mask), np.sort(order[:100_000]))


def test_the_work_may_run_in_other_processes():
    pool = {i: np.float32([i, 5 - i]) for i in range(5)}
    with ProcessPoolExecutor(2) as processes:
        assert find_cut(loads(pool), 3, run=processes.map) == find_cut(loads(pool), 3)


def shards(vector):
    prior, conditional = vector["shards"]["prior"], vector["shards"]["cond"]
    return {
        i: color_score(np.float32(p), np.float32(c))
        for i, (p, c) in enumerate(zip(prior, conditional, strict=True))
    }


def selected_ids(vector, k):
    masks = top_k(shards(vector), k=k)
    return {i for s, ids in enumerate(vector["shards"]["ids"]) for i in np.array(ids)[masks[s]]}


@pytest.mark.parametrize("case", VECTOR["cases"], ids=lambda case: f"tau{case['inputs']['tau']}")
def test_selections_reproduce_the_reference(case):
    k = case["outputs"]["k"]
    assert k == int(case["inputs"]["pool_size"] / case["inputs"]["tau"])
    assert selected_ids(VECTOR, k) == set(case["outputs"]["selected_ids_in_file_order"])


def test_a_tau_above_the_pool_is_refused_where_the_reference_keeps_everything():
    with pytest.raises(BudgetError, match="cannot keep 0 of 50"):
        top_k(shards(VECTOR), k=int(50 / 64))


def test_a_trailing_id_0_is_kept_where_the_reference_drops_it():
    quirk = next(q for q in VECTOR["quirks"] if q["name"] == "trailing_zero_id_dropped")
    reference = set(quirk["outputs"]["selected_ids_in_file_order"])
    ours = selected_ids(quirk["inputs"], 5)
    assert 0 not in reference and 0 in ours
    assert ours - {0} < reference


@given(
    st.lists(st.lists(st.lists(few_values, max_size=4), min_size=1, max_size=4), min_size=1),
    st.data(),
)
def test_a_cut_among_parts_is_one_among_what_they_consist_of(nested, data):
    """Whole parts of several small ones each: the same rows are kept."""
    joined = {i: np.float32([x for part in parts for x in part]) for i, parts in enumerate(nested)}
    total = sum(int((~np.isnan(scores)).sum()) for scores in joined.values())
    assume(total)
    cut = find_cut(loads(joined), data.draw(st.integers(1, total)))
    inner = cut.among([[len(part) for part in parts] for parts in nested])
    flat = [np.float32(part) for parts in nested for part in parts]
    kept = [inner.mask(index, part) for index, part in enumerate(flat)]
    whole = [cut.mask(index, scores) for index, scores in joined.items()]
    assert np.concatenate(kept).tolist() == np.concatenate(whole).tolist()
