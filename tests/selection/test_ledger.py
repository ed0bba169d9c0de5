from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.selection.ledger import (
    Moments,
    OwnedTokens,
    PairMoments,
    Tally,
    join_spans,
    moments_by_code,
    nearest,
    score_edges,
    tally_part,
)
from stillhouse.selection.ranking import (
    CONTAMINATED,
    ELIGIBLE,
    NAN,
    PRIOR_ROW,
    PartScores,
    data_span,
)

ROW = st.tuples(
    st.sampled_from([-2.0, -0.5, 0.0, 0.5, 0.5, 3.0, float("nan")]),
    st.sampled_from([ELIGIBLE, ELIGIBLE, ELIGIBLE, CONTAMINATED, PRIOR_ROW]),
    st.integers(0, 2),
)


def tally_of(part, rows, threshold=0.5):
    """The tally of rows (score, fate, source); a row has 8 tokens, all of its source's."""
    raw = np.array([row[0] for row in rows], np.float32)
    fate = np.array([row[1] for row in rows], np.int8)
    fate[np.isnan(raw)] = NAN
    source = np.array([row[2] for row in rows], np.int32)
    losses = {"prior": raw + 4, "conditional": np.full(len(rows), 4, np.float32)}
    weight, seen = np.full(len(rows), 8, np.int64), fate == PRIOR_ROW
    benchmark = np.where(fate == CONTAMINATED, source + 1, 0).astype(np.int32)
    scores = PartScores(raw, fate, losses, weight, seen, benchmark)
    kept = scores.value >= threshold
    return tally_part(part, f"part-{part}", scores, kept, threshold, owned=owned_by(source))


def owned_by(source):
    """Rows of 8 tokens in 1, 2 or 3 pieces, all of one source."""
    pieces = 1 + source.astype(np.int64)
    tokens = np.concatenate([[8, *[0] * (n - 1)] for n in pieces]) if len(pieces) else pieces
    return OwnedTokens(
        row_source=source,
        piece_row=np.repeat(np.arange(len(source)), pieces),
        piece_source=np.repeat(source, pieces),
        piece_tokens=tokens.astype(np.int64),
        labels=["a", "b", "c"],
    )


def test_tally_of_four_rows():
    rows = [(3.0, ELIGIBLE, 0), (0.0, ELIGIBLE, 0), (9.0, CONTAMINATED, 1), (np.nan, ELIGIBLE, 2)]
    tally = tally_of(0, rows)
    assert tally.fates == {
        "kept": 1,
        "below the cut": 1,
        "contaminated": 1,
        "nan": 1,
        "prior row": 0,
        "taken down": 0,
    }
    assert tally.benchmarks == {"2": 1}
    assert tally.rows == [
        {
            "part": 0,
            "path": "part-0",
            "rows": 4,
            "kept": 1,
            "below_the_cut": 1,
            "contaminated": 1,
            "prior_row": 0,
            "nan": 1,
            "taken_down": 0,
            "kept_tokens": 8,
        }
    ]
    assert (tally.sources["a"].pool_tokens, tally.sources["a"].kept_tokens) == (16, 8)
    assert tally.sources["b"].scores.mean == 9.0  # of ineligible rows too
    assert tally.sources["c"].scores.count == 0
    assert tally.examples["best"] == [(3.0, 0, 0)]
    assert tally.examples["below"] == [(0.0, 0, 1)]


@given(st.lists(st.lists(ROW, max_size=12), min_size=1, max_size=4))
def test_parts_add_up_to_the_whole(parts):
    total = Tally()
    for index, rows in enumerate(parts):
        total.add(Tally.from_json(tally_of(index, rows).to_json()))
    whole = tally_of(0, [row for rows in parts for row in rows])
    assert total.fates == whole.fates
    assert total.fate_tokens == whole.fate_tokens
    assert total.benchmarks == whole.benchmarks
    assert total.sources.keys() == whole.sources.keys()
    for name, source in whole.sources.items():
        found = total.sources[name]
        assert (found.pool_tokens, found.kept_tokens) == (source.pool_tokens, source.kept_tokens)
        assert (found.pool_rows, found.kept_rows) == (source.pool_rows, source.kept_rows)
        assert asdict(found.scores) == pytest.approx(asdict(source.scores), abs=1e-9)
    assert total.pool_scores == whole.pool_scores
    assert total.kept_losses == whole.kept_losses
    assert (total.seen, total.unseen, total.ties) == (whole.seen, whole.unseen, whole.ties)
    assert asdict(total.pieces.y) == pytest.approx(asdict(whole.pieces.y), abs=1e-9)
    assert total.pieces.products == pytest.approx(whole.pieces.products, abs=1e-9)
    for group, found in whole.examples.items():
        assert [score for score, _, _ in total.examples[group]] == [score for score, _, _ in found]
    assert sum(row["rows"] for row in total.rows) == sum(map(len, parts))


def test_nearest_takes_ties_by_address():
    found = [(1.0, 1, 0), (1.0, 0, 5), (2.0, 3, 3), (0.0, 0, 0)]
    assert nearest("best", found, 2) == [(2.0, 3, 3), (1.0, 0, 5)]
    assert nearest("worst", found, 2) == [(0.0, 0, 0), (1.0, 0, 5)]


def test_a_histogram_follows_its_data():
    """Scores of two models that hardly differ, 0.02 nats around 0: bins far smaller than that."""
    scores = np.linspace(-0.02, 0.02, 4001, dtype=np.float32)
    span = data_span(scores)
    assert span == pytest.approx((-0.02, 0.02), rel=1e-5)
    edges = score_edges(span)
    assert edges[1] - edges[0] == pytest.approx(0.04 / 320)
    outlier = np.append(scores, np.float32(50.0))
    assert data_span(outlier)[1] == pytest.approx(0.02 + 0.04, rel=0.01)  # a width further, not 50
    assert data_span(np.array([np.nan, np.inf], np.float32)) is None


def test_the_span_of_all_parts():
    assert join_spans([(0.0, 1.0), None, (-2.0, 0.5)], (7.0, 8.0)) == (-2.0, 1.0)
    assert join_spans([None], (7.0, 8.0)) == (7.0, 8.0)
    assert join_spans([(3.0, 3.0)], (7.0, 8.0)) == (2.5, 3.5)


def test_spread_of_a_pool_whose_parts_are_sorted_by_source():
    """Parts 0 and 1 hold one source that hardly varies; the spread is that of all parts."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, 0.01, 40) for _ in range(2)] + [
        rng.normal(3, 1, 40),
        rng.normal(-2, 1, 7),
    ]
    total = Tally()
    for index, scores in enumerate(parts):
        source = min(index, 2)
        rows = [(float(s), ELIGIBLE, source) for s in [*scores, np.nan]]
        total.add(Tally.from_json(tally_of(index, rows).to_json()))
    everything = np.concatenate(parts).astype(np.float32).astype(np.float64)
    assert total.pieces.y.std == pytest.approx(np.std(everything), rel=1e-9)
    pieces = np.repeat([1, 2, 3, 3], [40, 40, 40, 7])  # min(index, 2) + 1 a row
    expected = np.corrcoef(pieces, everything)[0, 1]
    assert total.pieces.correlation == pytest.approx(expected, rel=1e-9)
    late = np.concatenate(parts[2:]).astype(np.float32).astype(np.float64)
    assert total.sources["c"].scores.std == pytest.approx(np.std(late), rel=1e-9)
    assert total.sources["c"].scores.mean == pytest.approx(np.mean(late), rel=1e-9)


values = st.floats(-100, 100, width=32)
blocks = st.lists(st.lists(st.tuples(values, values), max_size=6), min_size=1, max_size=6)


@given(blocks, st.sampled_from([0.0, 1e7]))
def test_moments_of_blocks_add_up(found, offset):
    """With an offset of 1e7 plain sums of squares would keep two digits."""
    arrays = [np.array(block, np.float64).reshape(-1, 2) + offset for block in found]
    total = PairMoments()
    for block in arrays:
        total.add(PairMoments.of(block[:, 0], block[:, 1]))
    x, y = np.concatenate(arrays).T
    assert total.x.count == total.y.count == len(x)
    if not len(x):
        assert total == PairMoments() and total.x.std == total.correlation == 0
        return
    assert total.y.mean == pytest.approx(np.mean(y), abs=1e-6)
    assert total.y.std == pytest.approx(np.std(y), abs=1e-6)
    deviations = (x - np.mean(x)) * (y - np.mean(y))
    assert total.products == pytest.approx(np.sum(deviations), abs=1e-3)


def test_moments_by_code():
    codes = np.array([2, 0, 2, 2, 0], np.int32)
    found = moments_by_code(codes, np.array([1.0, 5.0, 2.0, 6.0, 7.0]), 4)
    assert found == [Moments(2, 6.0, 2.0), Moments(), Moments(3, 3.0, 14.0), Moments()]
