import random

from stillhouse.report.health import near_duplicates, shingles


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


def test_half_shared_texts_are_no_repeats():
    # 56 shingles each, 26 shared: Jaccard 26 / 86
    assert near_duplicates([sentence(0), sentence(30)]) == 0


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
