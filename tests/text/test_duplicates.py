import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.text.duplicates import (
    document_hash,
    hash_range,
    heldout_split,
    keyed_uniform,
    later_occurrences,
    normalise,
)

texts = st.lists(st.sampled_from(["a", "A ", "b", "c", "d", "e f", "e\tF"]) | st.text(max_size=2))


def hashes_of(listed):
    return np.frombuffer(b"".join(map(document_hash, listed)), np.uint8).reshape(-1, 16)


def test_normalising_folds_width_case_and_white_space():
    assert normalise("  The\u00a0ﬁrst\n\nＬＩＮＥ ") == "the first line"


def test_the_hash_is_a_prefix_of_sha256():
    assert document_hash(" ABC\n").hex() == "ba7816bf8f01cfea414140de5dae2223"
    assert len(document_hash("\ud800")) == 16


@settings(deadline=None)
@given(texts)
def test_later_occurrences_are_those_a_set_has_seen(listed):
    seen, expected = set(), []
    for text in listed:
        expected.append(normalise(text) in seen)
        seen.add(normalise(text))
    hashes = hashes_of(listed)
    assert later_occurrences(hashes).tolist() == expected
    assert later_occurrences(hashes.reshape(-1).view("V16")).tolist() == expected


@settings(deadline=None)
@given(texts, st.integers(1, 5))
def test_ranges_taken_alone_find_the_same_duplicates(listed, num_ranges):
    hashes = hashes_of(listed)
    ranges = hash_range(hashes, num_ranges)
    found = np.zeros(len(listed), dtype=bool)
    for index in range(num_ranges):
        found[ranges == index] = later_occurrences(hashes[ranges == index])
    assert np.array_equal(found, later_occurrences(hashes))


def test_ranges_are_of_equal_size_and_in_order():
    hashes = np.zeros((256, 16), dtype=np.uint8)
    hashes[:, 0] = np.arange(256)
    assert np.bincount(hash_range(hashes, 4)).tolist() == [64] * 4
    assert hash_range(hashes, 3)[[0, 85, 86, 255]].tolist() == [0, 0, 1, 2]


@settings(deadline=None)
@given(texts, st.floats(0.01, 0.99), st.integers(0, 9))
def test_copies_of_a_text_are_held_out_together_and_both_sides_have_some(listed, share, seed):
    held_out = heldout_split(hashes_of(listed), share, seed)
    sides = {}
    for text, out in zip(listed, held_out, strict=True):
        assert sides.setdefault(normalise(text), out) == out
    assert held_out.any() == (len(listed) >= 2)
    assert len(sides) < 2 or not held_out.all()


def test_about_the_share_is_held_out_and_the_seed_decides_which():
    hashes = hashes_of([str(i) for i in range(5000)])
    first, second = heldout_split(hashes, 0.1, seed=0), heldout_split(hashes, 0.1, seed=1)
    assert 440 < first.sum() < 560
    assert (first & second).sum() < 90
    assert np.array_equal(first[::-1], heldout_split(hashes[::-1], 0.1, seed=0))


def test_keyed_uniform_is_uniform_even_for_keys_in_a_row():
    draws = keyed_uniform(np.arange(20_000, dtype=np.uint64), seed=7)
    assert (draws > 0).all() and (draws < 1).all()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03
