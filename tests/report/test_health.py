from dataclasses import replace

import pytest

from stillhouse.report import health
from stillhouse.report.data import (
    Difference,
    SeenUnseen,
    SourceRow,
    TargetScores,
    TrainingRow,
)
from stillhouse.report.health import HealthInputs, check_health
from stillhouse.report.near_duplicates import NearDuplicates
from stillhouse.selection.sources import OTHER


def source(name: str, pool: int, kept: int, std: float | None = 0.4) -> SourceRow:
    return SourceRow(name, pool, kept, pool // 10, kept // 10, 0.1, std)


HEALTHY = HealthInputs(
    sources=[source("books", 5000, 800), source("web", 5000, 200)],
    target_scores=TargetScores(1.0, 0.5, 100, 0.0, 0.5, 1000),
    absolute=True,
    gain=Difference(-0.2, None),
    spread=0.5,
    correlations={"documents in a sequence": 0.5},
    num_scored=1000,
    num_nan=0,
    num_kept=100,
    num_tied=1,
    seen=SeenUnseen(100, 0.01, 900, 0.0, False),
    near_duplicates=NearDuplicates(1000, 10),
    packed_tokens=9950,
    remainder_tokens=50,
    num_documents=99_950,
    num_dead_letters=50,
    num_heldout=100,
    num_short=10,
    trainings=[TrainingRow("prior", 1000, 10, 4e-3, 8, 4.0, 0.01)],
)


def test_a_healthy_selection_has_no_warnings():
    assert check_health(HEALTHY) == []


@pytest.mark.parametrize(
    ("change", "title"),
    [
        ({"num_nan": 3}, "3 scores are not numbers (0.30\u202f%)"),
        (
            {"sources": [source("books", 5000, 500, 0.01), source("web", 5000, 500)]},
            "Scores hardly differ inside books",
        ),
        ({"correlations": {"bytes per token": 0.7}}, "The score follows bytes per token"),
        ({"correlations": {"bytes per token": -0.7}}, "The score follows bytes per token"),
        (
            {"seen": SeenUnseen(500, 0.3, 500, 0.0, False)},
            "What the prior was trained on scores differently",
        ),
        (
            {"sources": [source("books", 5000, 950), source("web", 5000, 50)]},
            "books makes up 95.0\u202f% of the selection",
        ),
        (
            {"prior_loss": 5.82, "vocab_size": 400},  # ln 400 is 5.99
            "The prior predicts no better than guessing",
        ),
        ({"unknown_tokens": 101}, "1.0\u202f% of the tokens are unknown to the tokenizer"),
        (
            {"sampled_documents": 1000, "changed_documents": 11},
            "Text does not come back from the tokenizer as it was",
        ),
        (
            {"num_short": 11},
            "11.0\u202f% of the held-out texts are too short to find contamination",
        ),
        ({"num_tied": 2}, "2 sequences tie at the cut"),
        (
            {"near_duplicates": NearDuplicates(1000, 11)},
            "1.1\u202f% of a sample of the kept are near-duplicates",
        ),
        ({"remainder_tokens": 200}, "2.0\u202f% of the tokens filled no sequence"),
        ({"num_dead_letters": 200}, "0.20\u202f% of the input rows could not be read"),
        (
            {"trainings": [TrainingRow("prior", 1000, 10, 4e-3, 8, 4.0, 0.2)]},
            "The loss of prior was still falling steeply at the end",
        ),
        ({"gain": Difference(0.01, None)}, "The selection is no better than random data"),
        ({"gain": Difference(-0.1, 0.2, 4)}, "The selection is no better than random data"),
        (
            {"target_scores": TargetScores(-1.0, 0.5, 100, 0.0, 0.5, 1000)},
            "Held-out target text scores no higher than the pool",
        ),
        (
            {"target_scores": TargetScores(0.04, 0.5, 10**6, 0.0, 0.5, 10**6)},
            "Held-out target text scores no higher than the pool",
        ),
        (
            {"target_scores": TargetScores(-0.1, 0.5, 100, -1.0, 0.5, 1000)},
            "The conditional does not know the target better than the prior",
        ),
    ],
)
def test_each_illness_is_named(change, title):
    assert [warning.title for warning in check_health(replace(HEALTHY, **change))] == [title]


def test_what_each_check_leaves_alone():
    small = [source("tiny", 100, 10, 0.0), source("web", 9900, 990), source("x", 500, 1, None)]
    assert list(health.near_constant(small, 0.4)) == []
    assert list(health.one_source([source("all", 100, 100)])) == []
    assert list(health.memorised(None, 0.4)) == []
    assert list(health.memorised(SeenUnseen(0, float("nan"), 10, 0.0, True), 0.4)) == []
    assert list(health.memorised(SeenUnseen(4, 0.3, 900, 0.0, True), 0.5)) == []  # noise
    assert list(health.repeats(None)) == []
    assert list(health.ties(0, 0)) == []
    assert list(health.knows_nothing(5.8, 400)) == []
    few = replace(HEALTHY, unknown_tokens=100, sampled_documents=1000, changed_documents=10)
    assert list(health.lost_text(few)) == []


def test_the_gravest_come_first():
    bad = replace(
        HEALTHY,
        num_nan=3,
        gain=Difference(0.1, None),
        target_scores=TargetScores(-1.0, 0.5, 100, 0.0, 0.5, 1000),
    )
    assert [warning.title.split()[0] for warning in check_health(bad)] == ["The", "Held-out", "3"]


def test_what_the_checks_of_the_score_leave_alone():
    assert list(health.no_better_than_random(None)) == []
    assert list(health.no_better_than_random(Difference(-0.1, 0.04, 4))) == []  # 2 errors: 0.04
    assert list(health.target_scores(None, absolute=True)) == []
    own = TargetScores(-0.1, 0.5, 100, -1.0, 0.5, 1000)  # a scale of its own: 0 means nothing
    assert list(health.target_scores(own, absolute=False)) == []


def test_other_sources_are_not_one():
    rows = [source(OTHER, 5000, 950, 0.0), source("web", 5000, 50)]
    assert list(health.one_source(rows)) == list(health.near_constant(rows, 0.4)) == []


def test_the_advice_on_memorised_rows_depends_on_whether_they_were_excluded():
    seen = SeenUnseen(500, 0.3, 500, 0.0, False)
    (asked,) = health.memorised(seen, 0.5)
    (told,) = health.memorised(replace(seen, excluded=True), 0.5)
    assert "exclude_prior_rows: true" in asked.detail
    assert "were not eligible" in told.detail
