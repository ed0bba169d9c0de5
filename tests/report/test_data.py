from dataclasses import replace

import pytest

from stillhouse.report.data import (
    Difference,
    ReportData,
    SourceRow,
    TargetLossRow,
    difference,
    from_json,
    source_shares,
    to_json,
)


def test_json_round_trip(report):
    assert from_json(to_json(report)) == report
    assert to_json(from_json(to_json(report))) == to_json(report)


def test_json_keeps_numbers_that_json_has_not(report):
    odd = replace(report, threshold=float("-inf"), sources=[], warnings=[])
    assert from_json(to_json(odd)).threshold == float("-inf")


def test_other_json_is_refused(report):
    with pytest.raises(ValueError, match="pool_tokens"):
        from_json(b'{"title": "x"}')
    with pytest.raises(ValueError, match="extra"):
        from_json(to_json(report).replace(b"{", b'{"extra": 1,', 1))


def test_shares_are_sorted_by_what_was_kept(report):
    rows = [
        SourceRow("b", 300, 0, 3, 0, -0.2, 0.1),
        SourceRow("a", 100, 50, 1, 1, 0.5, None),
        SourceRow("c", 0, 0, 0, 0, None, None),
    ]
    shares = source_shares(replace(report, sources=rows))
    assert [(s.row.name, s.pool, s.kept, s.ratio) for s in shares] == [
        ("a", 0.25, 1.0, 4.0),
        ("b", 0.75, 0.0, 0.0),
        ("c", 0.0, 0.0, None),
    ]


def test_differences_are_of_paired_seeds():
    random = TargetLossRow("random", 10, [4.0, 5.0])
    assert difference(TargetLossRow("color", 10, [3.5, 4.5]), random) == Difference(-0.5, 0.0, 2)
    assert difference(TargetLossRow("color", 10, [3.5]), random) == Difference(-1.0, None)
    assert random.mean == 4.5
    assert random.spread == pytest.approx(0.7071067811865476)


def test_only_the_first_block_is_needed():
    least = ReportData(
        "t", "2026-01-01T00:00:00", "store/runs/x", "fraction = 0.1", "documents",
        10, 1000, 1, 100, 10, 1000, 0.5, [],
    )  # fmt: skip
    assert from_json(to_json(least)) == least
