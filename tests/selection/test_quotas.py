import itertools
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import BudgetError
from stillhouse.selection.budget import find_cut
from stillhouse.selection.quotas import find_quota_cut

NAMES = ["books", "code", "web"]
shares = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.4, 0.5, 0.7, 1.0])
values = st.sampled_from([math.nan, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
rows = st.lists(st.tuples(values, st.integers(0, 2)), min_size=1, max_size=8)
by_source = st.dictionaries(st.integers(0, 2), shares, max_size=3)


def as_parts(listed, border):
    scores = np.array([score for score, _ in listed], dtype=np.float32)
    sources = np.array([source for _, source in listed], dtype=np.int32)
    halves = {"a": (scores[:border], sources[:border]), "b": (scores[border:], sources[border:])}
    return {part: partial(tuple, half) for part, half in halves.items()}


def kept_rows(cut, parts):
    return np.flatnonzero(np.concatenate([cut.mask(part, *load()) for part, load in parts.items()]))


def best_sum(listed, k, minimum, maximum):
    """The largest sum of scores of any k rows within the quotas, None if there are no such rows."""
    valid = [row for row in listed if not math.isnan(row[0])]
    best = None
    for chosen in itertools.combinations(valid, k):
        counts = [sum(source == s for _, source in chosen) for s in range(3)]
        low = all(counts[s] >= Fraction(repr(share)) * k for s, share in minimum.items())
        high = all(counts[s] <= Fraction(repr(share)) * k for s, share in maximum.items())
        if low and high:
            total = sum(score for score, _ in chosen)
            best = total if best is None else max(best, total)
    return best


@settings(deadline=None, max_examples=150)
@given(rows, st.data(), by_source, by_source)
def test_quotas_are_met_with_the_largest_sum_of_scores_or_refused(listed, data, minimum, maximum):
    k = data.draw(st.integers(1, len(listed)))
    parts = as_parts(listed, data.draw(st.integers(0, len(listed))))
    quotas = {"names": NAMES, "max_share": maximum, "min_share": minimum}
    expected = best_sum(listed, k, minimum, maximum)
    if expected is None:
        with pytest.raises(BudgetError):
            find_quota_cut(parts, k, **quotas)
        return
    chosen = [listed[i] for i in kept_rows(find_quota_cut(parts, k, **quotas), parts)]
    counts = [sum(source == s for _, source in chosen) for s in range(3)]
    assert len(chosen) == k and sum(score for score, _ in chosen) == expected
    assert all(counts[s] >= Fraction(repr(share)) * k for s, share in minimum.items())
    assert all(counts[s] <= Fraction(repr(share)) * k for s, share in maximum.items())


@settings(deadline=None, max_examples=30)
@given(rows, st.data())
def test_without_quotas_it_is_the_plain_cut(listed, data):
    parts = as_parts(listed, len(listed) // 2)
    num_valid = sum(not math.isnan(score) for score, _ in listed)
    for k in range(1, num_valid + 1):
        quota = find_quota_cut(parts, k, names=NAMES)
        plain = find_cut({part: partial(lambda load: load()[0], parts[part]) for part in parts}, k)
        assert quota.rest == plain and quota.score == plain.score


def test_shares_are_read_as_written():
    listed = [(float(i), 0) for i in range(100)] + [(200.0 + i, 1) for i in range(100)]
    cut = find_quota_cut(as_parts(listed, 70), 100, names=NAMES, max_share={1: 0.29})
    assert (kept_rows(cut, as_parts(listed, 70)) >= 100).sum() == 29  # 0.29 * 100 < 29 in floats
    cut = find_quota_cut(as_parts(listed, 70), 100, names=NAMES, min_share={0: 0.07})
    assert (kept_rows(cut, as_parts(listed, 70)) < 100).sum() == 7  # 0.07 * 100 > 7 in floats


def test_the_score_is_that_of_the_rest_or_of_the_worst_minimum():
    listed = [(5.0, 0), (4.0, 0), (1.0, 1), (0.0, 1)]
    parts = as_parts(listed, 2)
    assert find_quota_cut(parts, 2, names=NAMES, min_share={1: 0.5}).score == 5.0
    assert find_quota_cut(parts, 2, names=NAMES, min_share={0: 0.5, 1: 0.5}).score == 1.0


FOUR = [(5.0, 0), (4.0, 0), (1.0, 1), (math.nan, 1)]


@pytest.mark.parametrize(
    ("k", "quotas", "message"),
    [
        (3, {"min_share": {0: 0.6, 1: 0.3}}, None),
        (3, {"min_share": {1: 0.5}}, "`min_share` of source 'code' asks for 2 rows, it has 1"),
        (3, {"min_share": {2: 0.1}}, "source 'web' asks for 1 rows, it has 0"),
        (
            3,
            {"min_share": {0: 0.4, 1: 0.1}, "max_share": {0: 0.5}},
            "'books' asks for at least 2 of 3",
        ),
        (1, {"min_share": {0: 0.4, 1: 0.4}}, "more than 1 rows in all: 'books' 1, 'code' 1"),
        (3, {"max_share": {0: 0.4}}, "cannot keep 3 rows, .* allow 2: 'books' 1, 'code' 1, 'web'"),
        (4, {}, "cannot keep 4 rows"),
        (0, {}, "cannot keep 0 rows"),
    ],
)
def test_quotas_that_cannot_hold_are_refused_by_name(k, quotas, message):
    parts = as_parts(FOUR, 2)
    if message is None:
        assert kept_rows(find_quota_cut(parts, k, names=NAMES, **quotas), parts).tolist() == [
            0,
            1,
            2,
        ]
        return
    with pytest.raises(BudgetError, match=message):
        find_quota_cut(parts, k, names=NAMES, **quotas)
