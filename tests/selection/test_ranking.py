from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.fingerprint import fingerprint
from stillhouse.selection.quotas import Sources
from stillhouse.selection.ranking import (
    CONTAMINATED,
    ELIGIBLE,
    NAN,
    PRIOR_ROW,
    TAKEN_DOWN,
    PartRanks,
    RankedPart,
    Ranks,
    RankTask,
)
from stillhouse.selection.rules import find_rule
from stillhouse.selection.scorers import SCORES_SCHEMA
from stillhouse.selection.writing import group_parts
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import commit
from stillhouse.text.documents import Document
from stillhouse.text.packing import Packer, tokens_table
from stillhouse.text.pieces import label_table, read_pieces, row_sources

LENGTH = 8


def token_table(documents):
    """A token part of documents given as (source, number of tokens), packed in eights."""
    packer = Packer(sequence_length=LENGTH, eos_id=0, dtype=np.uint16, part_rows=1000)
    for row, (source, count) in enumerate(documents):
        packer.add(Document(0, row, f"d{row}", source, ""), np.full(count, row + 1, np.uint32))
    return tokens_table(packer.finish())


DOCUMENTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20)), min_size=1, max_size=12)


@given(DOCUMENTS)
def test_row_sources_against_counting(documents):
    table = token_table(documents)
    pieces = read_pieces(table)
    names = pieces.sources
    rows, owned = table["documents"].to_pylist(), {}
    for row in rows:
        for piece in row:
            owned.setdefault(piece["row"], piece["source"])
    found = [names[i] for i in row_sources(pieces, "sequences")]
    for row, name in zip(rows, found, strict=True):
        tokens = Counter()
        for piece in row:
            tokens[piece["source"]] += piece["end"] - piece["start"]
        best = max(tokens.values())
        assert name == min((n for n, c in tokens.items() if c == best), key=names.index)
    assert [names[i] for i in row_sources(pieces, "documents")] == list(owned.values())


@pytest.fixture
def part(tmp_path):
    """Three sequences of eight tokens: documents 0 (a: 6), 1 (b: 12), 2 (a: 6)."""
    store = Store(str(tmp_path))
    tokens = store.put_part(
        "tokens/parts/t.parquet", token_table([("a", 5), ("b", 11), ("a", 5)]), num_tokens=24
    )
    values = {
        "prior": ([9 / 7, 16 / 7, 2.0], [[5, 4], [16], [4, 10]], [[5, 2], [7], [2, 5]]),
        "conditional": ([6 / 7, 8 / 7, np.nan], [[4, 2], [8], [2, np.nan]], [[5, 2], [7], [2, 5]]),
        "flags": ([0.0, 1.0, 1.0], [None] * 3, [[0, 2], [8], [2, 0]]),
        "numbers": ([0.0, 3.0, 3.0], [None] * 3, [[0, 2], [8], [2, 0]]),
    }
    for name, columns in values.items():
        table = pa.table(dict(zip(SCORES_SCHEMA.names, columns, strict=True)), SCORES_SCHEMA)
        store.put_part(f"{name}.parquet", table, num_tokens=24)

    def make(rule="color", **changes):
        settings = {
            "contamination": None,
            "prior_rows": None,
            "exclude_prior_rows": True,
            "grain": "sequences",
            "seed": 0,
        }
        scores = {name: f"{name}.parquet" for name in ("prior", "conditional")}
        named = {"store": store, "tokens": tokens, "scores": scores}
        return RankedPart(**named, **settings | changes, rule=find_rule("rule", rule))

    return make


def test_sequences(part):
    found = part().read()
    np.testing.assert_allclose(found.value, [3 / 7, 8 / 7, np.nan], rtol=1e-6)
    assert found.fate.tolist() == [ELIGIBLE, ELIGIBLE, NAN]
    assert found.weight.tolist() == [8, 8, 8]


def test_ineligible_rows_keep_their_score(part):
    found = part(contamination="flags.parquet", prior_rows=np.array([0, 1])).read()
    assert np.isnan(found.value).all()
    np.testing.assert_allclose(found.raw[:2], [3 / 7, 8 / 7], rtol=1e-6)
    assert found.fate.tolist() == [PRIOR_ROW, CONTAMINATED, NAN]
    assert found.seen.tolist() == [True, True, False]
    found = part(prior_rows=np.array([0]), exclude_prior_rows=False).read()
    assert found.fate.tolist() == [ELIGIBLE, ELIGIBLE, NAN]
    assert found.seen.tolist() == [True, False, False]


def test_documents_are_sums_over_their_pieces(part):
    found = part(grain="documents").read()
    np.testing.assert_allclose(found.losses["prior"], [5 / 5, 24 / 11, 10 / 5], rtol=1e-6)
    np.testing.assert_allclose(found.value, [1 / 5, 12 / 11, np.nan], rtol=1e-6)
    assert found.weight.tolist() == [6, 12, 6]


def test_documents_are_ineligible_if_one_of_their_sequences_is(part):
    found = part(grain="documents", contamination="flags.parquet").read()
    assert found.fate.tolist() == [ELIGIBLE, CONTAMINATED, NAN]
    found = part(grain="documents", prior_rows=np.array([0])).read()
    assert found.fate.tolist() == [PRIOR_ROW, PRIOR_ROW, NAN]


def test_what_shares_text_with_a_benchmark_knows_its_number(part):
    found = part(benchmarks="numbers.parquet").read()
    assert found.fate.tolist() == [ELIGIBLE, CONTAMINATED, NAN]
    assert found.benchmark.tolist() == [0, 3, 3]
    found = part(benchmarks="numbers.parquet", grain="documents").read()
    assert found.fate.tolist() == [ELIGIBLE, CONTAMINATED, NAN]
    assert found.benchmark.tolist() == [0, 3, 0]
    assert part(contamination="flags.parquet").read().benchmark.tolist() == [0, 0, 0]


def test_taken_down_is_the_reason_whatever_else_a_row_is(part):
    taken = {"taken_down": np.array([1, 2])}
    found = part(contamination="flags.parquet", prior_rows=np.array([0, 1]), **taken).read()
    assert found.fate.tolist() == [PRIOR_ROW, TAKEN_DOWN, TAKEN_DOWN]
    assert np.isnan(found.value[1:]).all()
    found = part(grain="documents", taken_down=np.array([0])).read()
    assert found.fate.tolist() == [TAKEN_DOWN, ELIGIBLE, NAN]


def test_other_rules(part):
    np.testing.assert_allclose(
        part(rule="conditional_only").read().value, [-6 / 7, -8 / 7, np.nan], rtol=1e-6
    )
    random = part(rule="random").read().value.tolist()
    assert random == part(rule="random").read().value.tolist()
    assert random != part(rule="random", seed=1).read().value.tolist()


@pytest.fixture
def ranks(part):
    """The rank table of a part, and its receipt's info."""

    def make(sources=None, **changes):
        ranked = part(**changes)
        task = RankTask((ranked,), sources)
        receipt = commit(ranked.store, task, task.run(ranked.store, None, None))
        [info] = receipt.info["parts"]
        return Ranks(ranked.store.path(receipt.parts[0].path)), info

    return make


@pytest.mark.parametrize("row_group", [1, 2, 8192])
def test_rows_of_several_parts_in_one_table(part, row_group, monkeypatch):
    monkeypatch.setattr(RankTask, "ROW_GROUP", row_group)
    shared = {"contamination": "flags.parquet", "prior_rows": np.array([2])}
    parts = (part(), part(grain="documents", benchmarks="numbers.parquet"), part(**shared))
    task, store = RankTask(parts, None), parts[0].store
    receipt = commit(store, task, task.run(store, None, None))
    assert [info["rows"] for info in receipt.info["parts"]] == [3, 3, 3]
    for index, ranked in enumerate(parts):
        found, expected = PartRanks(receipt.parts[0], 3 * index, 3).read(store), ranked.read()
        for name in ("raw", "fate", "weight", "seen", "benchmark"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert found.losses.keys() == expected.losses.keys()
        for name, values in expected.losses.items():
            np.testing.assert_array_equal(found.losses[name], values)
    alone = replace(part(rule="random"), scores={})
    task = RankTask((alone,), None)
    receipt = commit(store, task, task.run(store, None, None))
    assert PartRanks(receipt.parts[0], 1, 2).read(store).losses == {}
    assert len(PartRanks(receipt.parts[0], 3, 0).read(store).raw) == 0


def test_what_the_cut_reads(ranks):
    found, info = ranks(Sources(("b",), others=True), contamination="flags.parquet")  # `a`: others
    np.testing.assert_allclose(found(), [3 / 7, np.nan, np.nan], rtol=1e-6)
    value, source = found.with_sources()
    assert source.tolist() == [1, 0, 1]  # 6 of a and 2 of b; 8 of b; 2 of b and 6 of a
    np.testing.assert_array_equal(value, found())
    assert found.weighted()[1].tolist() == [8, 8, 8]
    assert ranks(grain="documents")[0].weighted()[1].tolist() == [6, 12, 6]
    assert info["fates"] == {
        "eligible": 1,
        "contaminated": 1,
        "prior row": 0,
        "nan": 1,
        "taken down": 0,
    }
    low, high = info["span"]  # of all finite values, eligible or not
    assert (low, high) == pytest.approx((3 / 7, 8 / 7))
    assert info["loss_span"] == pytest.approx((6 / 7, 16 / 7))


def test_labels_of_a_part():
    """Three sequences of eight: a owns 6 + 6 tokens and two of them, b 2 + 8 + 2 and one."""
    pieces = read_pieces(token_table([("a", 5), ("b", 11), ("a", 5)]))
    assert label_table(pieces).to_pylist() == [
        {"label": "a", "tokens": 12, "sequences": 2, "documents": 2},
        {"label": "b", "tokens": 12, "sequences": 1, "documents": 1},
    ]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 60), st.integers(0, 3))
def test_groups_hold_every_part_once(kept, part_rows, seed):
    names = [fingerprint(i) for i in range(len(kept))]
    groups = group_parts(names, kept, part_rows, seed)
    assert sorted(index for group in groups for index in group) == list(range(len(kept)))
    for group in groups:
        assert len(group) == 1 or sum(kept[i] for i in group) <= part_rows
    for group, following in pairwise(groups):
        assert sum(kept[i] for i in group) + kept[following[0]] > part_rows


def test_order_is_keyed_by_content_and_seed():
    names = [fingerprint(i) for i in range(12)]
    first = group_parts(names, [1] * 12, 100, 0)
    assert first == group_parts(names, [1] * 12, 100, 0)
    assert first != group_parts(names, [1] * 12, 100, 1)
    backwards = group_parts(names[::-1], [1] * 12, 100, 0)
    assert [names[::-1][i] for i in backwards[0]] == [names[i] for i in first[0]]
    assert first != [list(range(12))]
