import itertools
import math
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import BudgetError
from stillhouse.selection import quotas
from stillhouse.selection.budget import find_cut
from stillhouse.selection.quotas import (
    MAX_SOURCES,
    OTHER,
    LabelCounts,
    Sources,
    check_others,
    find_quota_cut,
    named_shares,
)

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
    bounds = {"names": NAMES, "max_share": maximum, "min_share": minimum}
    expected = best_sum(listed, k, minimum, maximum)
    if expected is None:
        with pytest.raises(BudgetError):
            find_quota_cut(parts, k, **bounds)
        return
    chosen = [listed[i] for i in kept_rows(find_quota_cut(parts, k, **bounds), parts)]
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
    ("k", "bounds", "message"),
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
def test_quotas_that_cannot_hold_are_refused_by_name(k, bounds, message):
    parts = as_parts(FOUR, 2)
    if message is None:
        cut = find_quota_cut(parts, k, names=NAMES, **bounds)
        assert kept_rows(cut, parts).tolist() == [0, 1, 2]
        return
    with pytest.raises(BudgetError, match=message):
        find_quota_cut(parts, k, names=NAMES, **bounds)


def test_few_sources_are_all_counted_one_by_one():
    counts = LabelCounts()
    counts.add([("web", 10, 1), ("books", 20, 2)])
    counts.add([("web", 15, 3)])
    found = counts.choose()
    assert found == Sources(("books", "web"), num_rows=(2, 4))
    assert found.labels == ["books", "web"]
    assert found.codes(["web", "books", "web"]).tolist() == [1, 0, 1]


def test_of_many_the_largest_and_those_that_a_share_names():
    """1,200 labels of 1 to 1,200 tokens: two small ones are named, 998 others are the largest."""
    counts = LabelCounts(frozenset({"s0001", "s0100", "nowhere"}))
    counts.add((f"s{n:04}", n, 2 * n) for n in range(1, 1201))
    counts.add([(OTHER, 10**6, 5)])  # a source of that very name is among the others
    found = counts.choose()
    assert found.names == ("s0001", "s0100", *(f"s{n:04}" for n in range(203, 1201)))
    assert len(found.names) == MAX_SOURCES and found.others
    assert found.largest_other == 404  # s0202
    assert found.labels[-1] == OTHER and len(found.labels) == MAX_SOURCES + 1
    assert found.codes(["s0001", "s0002", OTHER, "s1200"]).tolist() == [0, 1000, 1000, 999]
    assert Sources.from_labels(found.labels).names == found.names


@given(
    st.lists(
        st.dictionaries(st.integers(0, 30), st.tuples(st.integers(1, 9), st.integers(0, 9))),
        max_size=6,
    )
)
def test_what_is_forgotten_is_bounded(parts):
    """With room for five labels: named ones are exact, others never above what is said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quotas, "_MOST_LABELS", 5)
        patch.setattr(quotas, "MAX_SOURCES", 3)
        counts = LabelCounts(frozenset({"7"}))
        rows: Counter[str] = Counter()
        for part in parts:
            found = [(str(label), *both) for label, both in part.items()]
            counts.add(found)
            rows.update({label: n for label, _, n in found})
        chosen = counts.choose()
    assert len(counts.counts) <= 11
    seen = {label for part in parts for label in map(str, part)}
    assert set(chosen.names) <= seen and (("7" in chosen.names) == ("7" in seen))
    assert chosen.others == (len(seen) > len(chosen.names))
    assert all(rows[label] <= chosen.largest_other for label in seen - set(chosen.names))
    if "7" in seen:
        assert counts.counts["7"][1] == rows["7"]


def test_shares_of_sources():
    pool = Sources(("books", "web"), others=True, largest_other=30)
    assert named_shares(0.5, None, pool) == {"max_share": {0: 0.5, 1: 0.5}, "min_share": {}}
    assert named_shares({"web": 0.5}, {"books": 0.1}, pool) == {
        "max_share": {1: 0.5},
        "min_share": {0: 0.1},
    }
    with pytest.raises(BudgetError, match="no source 'code' in the pool; it has books, web"):
        named_shares(None, {"code": 0.1}, pool)
    check_others(0.3, 100, pool)  # 30 rows are allowed
    check_others({"web": 0.01}, 100, pool)
    check_others(0.01, 100, Sources(("books", "web")))
    with pytest.raises(BudgetError, match=r"allows 29 of 100 rows .* has up to 30 rows"):
        check_others(0.29, 100, pool)


MANY = """
import resource
import numpy as np
from stillhouse.selection.ledger import OwnedTokens, Tally, tally_part
from stillhouse.selection.ranking import PartScores
from stillhouse.selection.quotas import LabelCounts
from stillhouse.training.stream import TokenSources
from stillhouse.training.group import WorkerGroup
from stillhouse.training.evaluate import SourceLossTally

PARTS, ROWS, TOKENS = 8, 50_000, 8
labels = lambda part: [f"https://example.org/{part}/{row}" for row in range(ROWS - 1)] + ["big"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = LabelCounts(frozenset({"https://example.org/7/7"}))
for part in range(PARTS):
    counts.add((label, TOKENS, 1) for label in labels(part))
sources = counts.choose()
total, losses = Tally(), SourceLossTally()
raw = np.arange(ROWS, dtype=np.float32)
for part in range(PARTS):
    codes = sources.codes(labels(part))
    owned = OwnedTokens(codes, np.arange(ROWS), codes, np.full(ROWS, TOKENS), sources.labels)
    fate, seen = np.zeros(ROWS, np.int8), np.zeros(ROWS, np.bool_)
    scores = PartScores(raw, fate, {}, np.full(ROWS, TOKENS), seen, np.zeros(ROWS, np.int32))
    total.add(tally_part(part, "p", scores, raw >= ROWS - 2, ROWS - 2, owned=owned))
    own = np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], 2, 1)
    losses.add(np.ones((ROWS, 1), np.float32), TokenSources(own, tuple(labels(part))))
found = losses.take(WorkerGroup())
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
big, named = total.sources["big"], total.sources["https://example.org/7/7"]
every = total.sources.values()
print(int(grown), len(total.sources), big.pool_tokens, big.kept_tokens, big.scores.mean, end=" ")
print(named.pool_tokens, named.scores.mean, sum(s.pool_tokens for s in every), end=" ")
print(sum(s.kept_rows for s in every), len(found), end=" ")
print(sum(loss.num_tokens for loss in found.values()))
"""


def test_a_source_for_every_row_fits_in_memory():
    """400,000 labels, one of which each part has: its counts are exact, memory is bounded.

    A dense array of a part's rows and sources would be 20 GB.
    """
    done = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, *numbers = done.stdout.split()
    assert numbers == [
        str(number)
        for number in (
            *(1001, 8 * 8, 8 * 8, 49_999.0),  # `big` is the last row of each part, and kept
            *(8, 7.0, 8 * 50_000 * 8),
            *(8 * 2, 1001, 8 * 50_000),
        )
    ]
    assert int(grown) < 300  # MB
