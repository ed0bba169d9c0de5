from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.selection.ranking import (
    CONTAMINATED,
    ELIGIBLE,
    NAN,
    PRIOR_ROW,
    RankedPart,
    Ranks,
    RankTask,
)
from stillhouse.selection.rules import find_rule
from stillhouse.selection.scorers import SCORES_SCHEMA
from stillhouse.selection.sources import Sources
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
    table = token_table([("a", 5), ("b", 11), ("a", 5)])
    tokens = store.put_part("tokens/parts/t.parquet", table, num_tokens=24)
    pieces = read_pieces(table)
    for name, sums in (
        ("prior", [[5, 4], [16], [4, 10]]),
        ("conditional", [[4, 2], [8], [2, np.nan]]),
    ):
        counts = [[5, 2], [7], [2, 5]]
        scores = pa.table(
            {
                "value": [sum(s) / 7 for s in sums],
                "piece_nll_sum": sums,
                "piece_tokens": counts,
            },
            schema=SCORES_SCHEMA,
        )
        store.put_part(f"{name}.parquet", scores, num_tokens=24)
    flags = {"value": [0.0, 1.0, 1.0], "piece_nll_sum": [None] * 3}
    flags["piece_tokens"] = [[0, 2], [8], [2, 0]]
    store.put_part("flags.parquet", pa.table(flags, schema=SCORES_SCHEMA), num_tokens=24)
    assert pieces.owners().tolist() == [0, 1, 1, 1, 2]

    def make(**changes):
        settings = {
            "contamination": None,
            "prior_rows": None,
            "exclude_prior_rows": True,
            "rule": "color",
            "grain": "sequences",
            "seed": 0,
        }
        scores = {name: f"{name}.parquet" for name in ("prior", "conditional")}
        settings |= changes
        settings["rule"] = find_rule("rule", settings["rule"])
        return RankedPart(store=store, tokens=tokens, scores=scores, **settings)

    return make


def test_sequences(part):
    found = part().read()
    np.testing.assert_allclose(found.value, [3 / 7, 8 / 7, np.nan], rtol=1e-6)
    assert found.fate.tolist() == [ELIGIBLE, ELIGIBLE, NAN]
    assert found.weight.tolist() == [8, 8, 8]


def test_rows_that_may_not_be_chosen_keep_their_score(part):
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


def test_documents_are_judged_by_all_their_sequences(part):
    found = part(grain="documents", contamination="flags.parquet").read()
    assert found.fate.tolist() == [ELIGIBLE, CONTAMINATED, NAN]
    found = part(grain="documents", prior_rows=np.array([0])).read()
    assert found.fate.tolist() == [PRIOR_ROW, PRIOR_ROW, NAN]


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
        task = RankTask(ranked, sources)
        receipt = commit(ranked.store, task, task.run(ranked.store, None, None))
        return Ranks(ranked.store.path(receipt.parts[0].path)), receipt.info

    return make


def test_what_the_cut_reads(ranks):
    found, info = ranks(Sources(("b",), others=True), contamination="flags.parquet")  # `a`: others
    np.testing.assert_allclose(found(), [3 / 7, np.nan, np.nan], rtol=1e-6)
    value, source = found.with_sources()
    assert source.tolist() == [1, 0, 1]  # 6 of a and 2 of b; 8 of b; 2 of b and 6 of a
    np.testing.assert_array_equal(value, found())
    assert found.weighted()[1].tolist() == [8, 8, 8]
    assert info["fates"] == {"eligible": 1, "contaminated": 1, "prior row": 0, "nan": 1}
    low, high = info["span"]  # of all finite values, whatever may be chosen
    assert (low, high) == pytest.approx((3 / 7, 8 / 7))
    assert info["loss_span"] == pytest.approx((6 / 7, 16 / 7))


def test_documents_have_their_tokens_as_weights(ranks):
    found, _ = ranks(grain="documents")
    value, weight = found.weighted()
    np.testing.assert_allclose(value, [1 / 5, 12 / 11, np.nan], rtol=1e-6)
    assert weight.tolist() == [6, 12, 6]


def test_labels_of_a_part():
    """Three sequences of eight: a owns 6 + 6 tokens and two of them, b 2 + 8 + 2 and one."""
    pieces = read_pieces(token_table([("a", 5), ("b", 11), ("a", 5)]))
    assert label_table(pieces).to_pylist() == [
        {"label": "a", "tokens": 12, "sequences": 2, "documents": 2},
        {"label": "b", "tokens": 12, "sequences": 1, "documents": 1},
    ]
