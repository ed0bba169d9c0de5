import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data_settings import DataSource
from stillhouse.selection.contamination import (
    BenchmarksTask,
    ContaminationScorer,
    NgramIndex,
    files_of,
    word_ngrams,
)
from stillhouse.storage.artifact import Store
from stillhouse.text.tasks import PackTask, ScanTask, UnitFile
from stillhouse.text.tokenizer import load_tokenizer

HELD_OUT = "it was the best of times, it was the worst of times, it was the age of wisdom"
words = st.lists(st.sampled_from("abcd"), max_size=30)


@pytest.mark.parametrize(
    ("num_words", "num_grams"), [(0, 0), (7, 0), (8, 1), (12, 1), (13, 1), (14, 2), (20, 8)]
)
def test_number_of_grams_by_length(num_words, num_grams):
    grams = word_ngrams(" ".join(f"w{i}" for i in range(num_words)))
    assert grams.dtype == np.uint64 and len(grams) == num_grams == len(set(grams.tolist()))


def test_case_and_punctuation_do_not_matter_but_order_does():
    text = word_ngrams("One two, three: four five six seven eight").tolist()
    assert text == word_ngrams("one TWO three four -- five six seven (eight)").tolist()
    assert text != word_ngrams("two one three four five six seven eight").tolist()


def test_hits_count_the_different_shared_grams():
    index = NgramIndex.from_texts([HELD_OUT, "another text of no interest"])
    assert len(index.hashes) == 18 - 13 + 1
    assert index.hits(HELD_OUT) == 6
    assert index.hits(f"he wrote: {HELD_OUT}; and again: {HELD_OUT}") == 6
    assert index.hits("it was the best of times, it was the worst of all times") == 0
    assert index.hits("best of times it was the worst of times it was the age, she said") == 1
    assert NgramIndex.from_texts([]).hits(HELD_OUT) == 0


def test_texts_that_are_never_found_inside_others_are_counted():
    """A short text is one gram as a whole: only an equal document has it."""
    short, exact = "a question of seven words is asked", " ".join("abcdefghijklm")
    index = NgramIndex.from_texts([HELD_OUT, short, exact, short + " in eleven words here"])
    assert (index.num_texts, index.num_short) == (4, 2)
    assert index.hits(f"here: {short} in eleven words here, they said") == 0
    assert index.hits(f"here: {exact} they said") == 1


@settings(deadline=None)
@given(st.lists(words, max_size=4), words, st.integers(1, 4))
def test_hits_equal_the_intersection_of_sets_of_tuples(texts, text, n):
    def grams(listed):
        return {tuple(listed[i : i + n]) for i in range(len(listed) - n + 1)}

    index = NgramIndex.from_texts([" ".join(listed) for listed in texts], n)
    expected = grams(text) & set().union(*map(grams, texts))
    assert index.hits(" ".join(text)) == len(expected)


def unit_of(paths):
    """The task that packs JSON Lines, whose digests are their names."""
    files = tuple(UnitFile(str(path), path.stem, None) for path in paths)
    scan = ScanTask(files, DataSource(path=[str(path) for path in paths]))
    return PackTask(scan, "", "tokenizer", "<|eos|>", 16, 1000)


def test_what_shares_text_with_which_benchmark(untrained, tmp_path):
    """The file of each n-gram, the first one where two have it; documents of 16 words or so."""
    texts = [" ".join(f"{letter}{i}" for i in range(16)) for letter in "abcd"]
    files = {"x": [texts[0], "short"], "y": [texts[1], texts[0]], "pool": [*texts, texts[1]]}
    for name, content in files.items():
        lines = [json.dumps({"text": text}) for text in content]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    benchmarks = [unit_of([tmp_path / f"{name}.jsonl"]) for name in "xy"]
    assert [*files_of(benchmarks)] == ["x", "y"]
    store, folder = Store(str(tmp_path / "store")), untrained["tokenizer"]["path"]
    arrays = BenchmarksTask(tuple(benchmarks), folder, None).fit(store)
    assert len(arrays["values"]) == 2 * (16 - 13 + 1)
    assert np.bincount(arrays["files"]).tolist() == [0, 4, 4]
    assert arrays["texts"].tolist() == [4, 1]
    tokenizer = load_tokenizer(folder, None)
    pool = unit_of([tmp_path / "pool.jsonl"])
    (table,) = pool.run(store, tokenizer, None).tables
    scores = ContaminationScorer(arrays, tokenizer).score(table)
    rows = table["documents"].to_pylist()
    number = {0: 1, 1: 2, 4: 2}  # of pool documents
    for row, value, tokens in zip(
        rows, *scores.drop("piece_nll_sum").to_pydict().values(), strict=True
    ):
        hit = [number[piece["row"]] for piece in row if piece["row"] in number]
        assert value == min(hit, default=0)
        assert [n > 0 for n in tokens] == [piece["row"] in number for piece in row]
