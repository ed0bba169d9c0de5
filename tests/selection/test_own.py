import json
import sys

import numpy as np
import pyarrow as pa
import pytest

from stillhouse.errors import CustomCodeError, SpecError
from stillhouse.selection.own import OwnTokenScorer, find_code, fit
from stillhouse.text.packing import tokens_schema

LENGTHS = """
import numpy as np
from own_words.helpers import words

class Lengths:
    def __init__(self, factor=1):
        self.factor = factor
    def fit(self, target, pool):
        return {"mean": np.array([np.mean([words(t) for t in target])])}
    def load(self, state):
        self.mean = float(state["mean"][0])
    def score(self, texts):
        if "boom" in texts:
            raise ValueError("no booms\\nplease")
        if "wide" in texts:
            return np.zeros((len(texts), 2))
        return [self.factor * words(t) - self.mean for t in texts]

class Half:
    def score(self, texts):
        return []

class Child(Half):
    pass
"""
NAME = "own_words.deep.scorers:Lengths"


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_words"
    (package / "deep").mkdir(parents=True)
    (package / "deep" / "scorers.py").write_text(LENGTHS)
    (package / "helpers.py").write_text("def words(text):\n    return len(text.split())\n")
    (package / "notes.txt").write_text("not sent")
    yield find_code(NAME)
    for name in [n for n in sys.modules if n.split(".")[0] == "own_words"]:
        del sys.modules[name]


def tokens(sequences, pieces):
    """A token part of texts; pieces as (document, start, end) for each sequence."""
    width = len(sequences[0])
    ids = np.array([[ord(c) for c in text] for text in sequences], np.uint16)
    documents = [
        [
            {"id": i, "source": "s", "start": a, "end": b, "file": 0, "row": int(i)}
            for i, a, b in found
        ]
        for found in pieces
    ]
    kind = tokens_schema(width, np.uint16).field("documents").type
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), width),
            "documents": pa.array(documents, kind),
        }
    )


def test_a_package_is_sent_whole_and_its_content_is_its_identity(code, tmp_path):
    assert [path for path, _ in code.files] == ["own_words/deep/scorers.py", "own_words/helpers.py"]
    assert find_code(NAME).digest == code.digest
    (tmp_path / "own_words" / "helpers.py").write_text("def words(text):\n    return 1\n")
    changed = find_code(NAME)
    assert changed.digest != code.digest
    assert code.build({}).fit(["a b"], [])["mean"] == [2.0]
    assert changed.build({}).fit(["a b"], [])["mean"] == [1.0]
    assert find_code("own_words.deep.scorers:Child").files == changed.files  # it may inherit `fit`


def test_a_module_at_the_top_is_sent_alone(code, tmp_path):
    methods = "".join(f"\n def {name}(self): ..." for name in ("fit", "load", "score"))
    (tmp_path / "plain.py").write_text(f"class S:{methods}")
    assert [path for path, _ in find_code("plain:S").files] == ["plain.py"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_words.deep.missing:Lengths", "no module `own_words.deep.missing`"),
        ("own_words.deep.scorers:Length", "only: Child, Half, Lengths"),
        ("own_words.deep.scorers:Half", "no method fit, load"),
        ("stillhouse.jobs.cli:Lengths", "`stillhouse` is taken"),
        ("broken:S", "broken.py:2"),
        ("large:S", "2,000,001 bytes"),
    ],
)
def test_what_is_no_scorer_is_refused(code, tmp_path, name, says):
    (tmp_path / "broken.py").write_text("class S:\n    def fit(:\n")
    (tmp_path / "large.py").write_text("#" * 2_000_001)
    with pytest.raises(SpecError, match=r"scorer\.import") as refused:
        find_code(name)
    assert says in str(refused.value)


def scorer(code, grain, mean=0.0, **settings):
    return OwnTokenScorer({"mean": np.array([mean])}, Letters(), code, settings, grain)


def test_sequences_are_scored_by_their_text(code):
    table = tokens(["a b c ", "abcdef"], [[("0", 0, 6)], [("1", 0, 6)]])
    scores = scorer(code, "sequences", mean=1.0, factor=2).score(table)
    assert scores["value"].to_pylist() == [5.0, 1.0]
    assert scores["piece_nll_sum"].null_count == 2


def test_documents_are_scored_whole(code):
    """The first document has 4 words, in both sequences."""
    table = tokens(["a b c ", "d efgh"], [[("0", 0, 6)], [("0", 0, 2), ("1", 2, 6)]])
    scores = scorer(code, "documents").score(table)
    sums, counts = scores["piece_nll_sum"].to_pylist(), scores["piece_tokens"].to_pylist()
    means = [[s / n for s, n in zip(*row, strict=True)] for row in zip(sums, counts, strict=True)]
    assert means == [[4.0], [4.0, 1.0]]


def test_errors_of_the_code_say_where(code):
    made = scorer(code, "sequences")
    with pytest.raises(CustomCodeError) as failed:
        made.score(tokens(["boom"], [[("0", 0, 4)]]))
    assert "failed in `score`: ValueError: no booms (own_words/deep/scorers.py:1" in str(
        failed.value
    )
    with pytest.raises(CustomCodeError, match=r"shape \(1, 2\) for 1 texts"):
        made.score(tokens(["wide"], [[("0", 0, 4)]]))
    with pytest.raises(CustomCodeError, match="cannot be made: TypeError"):
        code.build({"colour": 1})
    with pytest.raises(CustomCodeError, match="failed in `load`: KeyError: 'mean'"):
        OwnTokenScorer({}, Letters(), code, {}, "sequences")


def test_what_is_learned_is_arrays_of_numbers(code):
    class Objects:
        def fit(self, target, pool):
            return {"words": json.dumps([])}

    with pytest.raises(CustomCodeError, match="'words' as str"):
        fit(code, Objects(), [], [])
    assert fit(code, code.build({}), ["a b", "a b c d"], [])["mean"].tolist() == [3.0]
