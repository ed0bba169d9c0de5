"""Which sources are counted one by one, against plain counting; a million of them fit in memory."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import BudgetError
from stillhouse.selection import sources as module
from stillhouse.selection.quotas import check_others, named_shares
from stillhouse.selection.sources import MAX_SOURCES, OTHER, LabelCounts, Sources


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
        patch.setattr(module, "_MOST_LABELS", 5)
        patch.setattr(module, "MAX_SOURCES", 3)
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


MILLION = """
import resource
import numpy as np
from stillhouse.selection.ledger import OwnedTokens, Tally, tally_part
from stillhouse.selection.ranking import PartScores
from stillhouse.selection.sources import LabelCounts
from stillhouse.training.batches import TokenSources
from stillhouse.training.group import WorkerGroup
from stillhouse.training.evaluate import SourceLossTally

PARTS, ROWS, TOKENS = 20, 50_000, 8
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
    scores = PartScores(raw, raw, fate, {}, np.full(ROWS, TOKENS), seen)
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


def test_a_million_sources_fit_in_memory():
    """A label for every row, but for one that each part has once: counts exact, memory bounded.

    A dense array of a part's rows and sources alone would be 20 GB.
    """
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, *numbers = done.stdout.split()
    assert numbers == [
        str(number)
        for number in (
            *(1001, 20 * 8, 20 * 8, 49_999.0),  # `big` is the last row of each part, and kept
            *(8, 7.0, 20 * 50_000 * 8),
            *(20 * 2, 1001, 20 * 50_000),
        )
    ]
    assert int(grown) < 300  # MB
