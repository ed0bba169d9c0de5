from stillhouse.report.near_duplicates import NearDuplicates, near_duplicates, shingles


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
    assert near_duplicates([first, other, edited, first]) == NearDuplicates(4, 2)


def test_half_shared_texts_are_no_repeats():
    # 56 shingles each, 26 shared: Jaccard 26 / 86
    assert near_duplicates([sentence(0), sentence(30)]) == NearDuplicates(2, 0)


def test_finds_nearly_all_of_many_repeats_and_nothing_else():
    firsts = [sentence(1000 * index) for index in range(60)]
    seconds = [text.rsplit(" ", 4)[0] for text in firsts]
    assert near_duplicates(firsts + seconds) == NearDuplicates(120, 60)


def test_texts_without_words_and_empty_samples():
    assert near_duplicates(["", "", "\ud800", "!!!"]) == NearDuplicates(4, 0)
    assert near_duplicates([]).share == 0.0
