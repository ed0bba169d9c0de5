"""What each check of a selection warns of, and what it leaves alone."""

import random
from collections import Counter

import numpy as np
import pytest

from stillhouse.report import health
from stillhouse.report.health import near_duplicates, shingles
from stillhouse.selection.ledger import Moments, PairMoments, SourceTally, Tally
from stillhouse.selection.quotas import OTHER

COUNTS = Counter(tokens=9950, remainder_tokens=50, documents=99_950, sampled_documents=1000)


def moments(mean, std, count):
    return Moments(count, mean, std**2 * count)


def sources(*rows):
    """(name, tokens in the pool, kept, standard deviation of scores or None)."""
    return {
        name: SourceTally(pool, kept, pool // 10, kept // 10,
                          Moments() if std is None else moments(0.1, std, 100))
        for name, pool, kept, std in rows
    }  # fmt: skip


def tally(num_seen, seen, num_unseen, unseen, spread=0.5):
    return Tally(
        seen=[num_seen, num_seen * seen],
        unseen=[num_unseen, num_unseen * unseen],
        pieces=PairMoments(y=moments(0, spread, 1000)),
    )


BOOKS = [("books", 5000, 800, 0.4), ("web", 5000, 200, 0.4)]
WARNS = [
    (health.no_better_than_random([0.01]), "The selection is no better than random data"),
    (  # 0.1 better, and two standard errors are 0.2
        health.no_better_than_random([-0.1 - 0.2 * 0.75**0.5, -0.1 + 0.2 * 0.75**0.5, -0.3, 0.1]),
        "The selection is no better than random data",
    ),
    (
        health.target_scores(moments(-1, 0.5, 100), moments(0, 0.5, 1000), absolute=True),
        "Held-out target text scores no higher than the pool",
    ),
    (
        health.target_scores(moments(0.04, 0.5, 10**6), moments(0, 0.5, 10**6), absolute=True),
        "Held-out target text scores no higher than the pool",
    ),
    (
        health.target_scores(moments(-0.1, 0.5, 100), moments(-1, 0.5, 1000), absolute=True),
        "The conditional does not know the target better than the prior",
    ),
    (health.knows_nothing(5.82, 400), "The prior predicts no better than guessing"),  # ln 400: 5.99
    (
        health.lost_text(COUNTS + Counter(unknown_tokens=101)),
        "1.0\u202f% of the tokens are unknown to the tokenizer",
    ),
    (
        health.lost_text(COUNTS + Counter(changed_documents=11)),
        "Text does not come back from the tokenizer as it was",
    ),
    (health.nan_scores(3, 1000), "3 scores are not numbers (0.30\u202f%)"),
    (
        health.near_constant(sources(("books", 5000, 500, 0.01), ("web", 5000, 500, 0.4)), 0.5),
        "Scores hardly differ inside books",
    ),
    (health.mostly_length("bytes per token", 0.7), "The score follows bytes per token"),
    (health.mostly_length("bytes per token", -0.7), "The score follows bytes per token"),
    (
        health.memorised(tally(500, 0.3, 500, 0.0), excluded=False),
        "What the prior was trained on scores differently",
    ),
    (
        health.one_source(sources(("books", 5000, 950, 0.4), ("web", 5000, 50, 0.4))),
        "books makes up 95.0\u202f% of the selection",
    ),
    (health.ties(2, 100), "2 sequences tie at the cut"),
    (health.repeats(11, 1000), "1.1\u202f% of a sample of the kept are near-duplicates"),
    (
        health.remainder(Counter(tokens=9800, remainder_tokens=200)),
        "2.0\u202f% of the tokens filled no sequence",
    ),
    (health.unreadable(200, 99_800), "0.20\u202f% of the input rows could not be read"),
    (
        health.too_short(11, 100),
        "11.0\u202f% of the held-out texts are too short to find contamination",
    ),
    (
        health.unfinished([("prior", 0.2, False), ("color", 0.07, True), ("x", 0.01, True)]),
        "The loss of prior and of 1 more trainings was still falling steeply at the end",
    ),
]


@pytest.mark.parametrize(("found", "title"), [(list(found), title) for found, title in WARNS])
def test_each_fault_is_named(found, title):
    assert [warning.title for warning in found] == [title]
    assert len(found[0].detail) > 40


QUIET = [
    health.no_better_than_random([]),
    health.no_better_than_random([-0.2]),
    health.no_better_than_random([-0.14, -0.06, -0.13, -0.07]),  # two standard errors: 0.04
    health.target_scores(Moments(), moments(0, 0.5, 10), absolute=True),
    health.target_scores(moments(1, 0.5, 100), moments(0, 0.5, 1000), absolute=True),
    # a scale of its own: 0 means nothing
    health.target_scores(moments(-0.1, 0.5, 100), moments(-1, 0.5, 1000), absolute=False),
    health.knows_nothing(None, 400),
    health.knows_nothing(5.8, 400),
    health.lost_text(COUNTS + Counter(unknown_tokens=100, changed_documents=10)),
    health.nan_scores(0, 1000),
    health.near_constant(
        sources(("tiny", 100, 10, 0.0), ("web", 9900, 990, 0.4), ("x", 500, 1, None)), 0.4
    ),
    health.near_constant(sources((OTHER, 5000, 950, 0.0)), 0.4),
    health.mostly_length("bytes per token", 0.5),
    health.memorised(tally(0, 0, 10, 0.0), excluded=True),
    health.memorised(tally(4, 0.3, 900, 0.0), excluded=True),  # noise
    health.one_source(sources(("all", 100, 100, 0.4))),
    health.one_source(sources(*BOOKS)),
    health.one_source(sources((OTHER, 5000, 950, 0.4), ("web", 5000, 50, 0.4))),
    health.ties(1, 100),
    health.repeats(10, 1000),
    health.repeats(0, 0),
    health.remainder(COUNTS),
    health.unreadable(50, 99_950),
    health.too_short(10, 100),
    health.unfinished([("prior", 0.01, False), ("color", None, False)]),
]


@pytest.mark.parametrize("found", [list(found) for found in QUIET])
def test_what_each_check_leaves_alone(found):
    assert found == []


def test_advice_fits_what_was_done():
    (asked,) = health.memorised(tally(500, 0.3, 500, 0.0), excluded=False)
    (told,) = health.memorised(tally(500, 0.3, 500, 0.0), excluded=True)
    assert "exclude_prior_rows: true" in asked.detail and "were not eligible" in told.detail
    (by_hand,) = health.unfinished([("prior", 0.2, False)])
    (chosen,) = health.unfinished([("prior", 0.2, True)])
    assert "`auto` chooses both" in by_hand.detail and "auto" not in chosen.detail


def test_noise_is_the_standard_error_over_seeds():
    gaps = [-0.14, -0.06, -0.13, -0.07]
    error = 2 * np.std(gaps, ddof=1) / 2
    assert list(health.no_better_than_random([gap + 0.1 - error - 0.001 for gap in gaps])) == []
    assert len(list(health.no_better_than_random([gap + 0.1 - error + 0.001 for gap in gaps]))) == 1


def sentence(start: int, num_words: int = 60) -> str:
    return " ".join(f"word{start + index}" for index in range(num_words))


def test_shingles_are_runs_of_five_words_whatever_the_case():
    assert len(shingles("one two three four five six seven")) == 3
    assert shingles("One, two; THREE four five") == shingles("one two three four five")
    assert len(shingles("too short")) == 1
    assert shingles(" ... ") == frozenset()


def test_counts_each_text_that_repeats_an_earlier_one():
    first, other = sentence(0), sentence(1000)
    edited = first + " and a little more"  # 56 shingles of 60
    assert near_duplicates([first, other, edited, first]) == 2


def test_finds_nearly_all_of_many_repeats_and_nothing_else():
    firsts = [sentence(1000 * index) for index in range(60)]
    seconds = [text.rsplit(" ", 4)[0] for text in firsts]
    assert near_duplicates(firsts + seconds) == 60


def test_texts_without_words_and_empty_samples():
    assert near_duplicates(["", "", "\ud800", "!!!"]) == 0
    assert near_duplicates([]) == 0


def test_the_rarest_shingles_miss_no_pair():
    """Against every pair compared, over texts of shared and own sentences."""
    rng = random.Random(0)
    texts = [" ".join(sentence(40 * rng.randrange(12), 40) for _ in range(5)) for _ in range(80)]
    kept, repeats = [], 0
    for text in texts:
        mine = shingles(text)
        if any(len(mine & other) / len(mine | other) >= 0.8 for other in kept):
            repeats += 1
        else:
            kept.append(mine)
    assert near_duplicates(texts) == repeats > 0
