import json
import sys

import numpy as np
import pyarrow as pa
import pytest

from stillhouse.errors import ScorerError, SpecError
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


class Words:
    """A tokenizer whose tokens are letters: what `decode` gives is all that is asked of it."""

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def code(tmp_path):
    package = tmp_path / "own_words"
    (package / "deep").mkdir(parents=True)
    (package / "deep" / "scorers.py").write_text(LENGTHS)
    (package / "helpers.py").write_text("def words(text):\n    return len(text.split())\n")
    (package / "notes.txt").write_text("not sent")
    yield find_code("own_words.deep.scorers:Lengths", [str(tmp_path)])
    for name in [n for n in sys.modules if n.split(".")[0] == "own_words"]:
        del sys.modules[name]


def tokens(sequences, pieces):
    width = len(sequences[0])
    ids = np.array([[ord(c) for c in text] for text in sequences], np.uint16)
    schema = tokens_schema(width, np.uint16)
    owners = [
        [
            {"id": i, "source": "s", "start": a, "end": b, "file": 0, "row": int(i)}
            for i, a, b in found
        ]
        for found in pieces
    ]
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), width),
            "documents": pa.array(owners, schema.field("documents").type),
        }
    )


def test_a_package_is_sent_whole_and_nothing_else(code):
    assert [path for path, _ in code.files] == ["own_words/deep/scorers.py", "own_words/helpers.py"]


def test_the_code_is_its_identity(code, tmp_path):
    same = find_code("own_words.deep.scorers:Lengths", ["/nowhere", str(tmp_path)])
    assert same.digest == code.digest
    (tmp_path / "own_words" / "helpers.py").write_text("def words(text):\n    return 1\n")
    changed = find_code("own_words.deep.scorers:Lengths", [str(tmp_path)])
    assert changed.digest != code.digest
    assert code.build({}).fit(["a b"], [])["mean"] == [2.0]
    assert changed.build({}).fit(["a b"], [])["mean"] == [1.0]


def test_a_module_at_the_top_is_sent_alone(tmp_path):
    (tmp_path / "plain.py").write_text(
        "class S:\n def fit(self): ...\n def load(self): ...\n def score(self): ..."
    )
    (tmp_path / "other.py").write_text("")
    assert [p for p, _ in find_code("plain:S", [str(tmp_path)]).files] == ["plain.py"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_words.deep.missing:Lengths", "no module `own_words.deep.missing`"),
        ("own_words.deep.scorers:Length", "there: Child, Half, Lengths"),
        ("own_words.deep.scorers:Half", "no method fit, load"),
        ("stillhouse.jobs.cli:Lengths", "`stillhouse` is taken"),
    ],
)
def test_what_is_no_scorer_is_refused(code, tmp_path, name, says):
    with pytest.raises(SpecError, match=r"scorer\.import") as refused:
        find_code(name, [str(tmp_path)])
    assert says in str(refused.value)


def test_broken_and_large_code_is_refused(tmp_path):
    (tmp_path / "broken.py").write_text("class S:\n    def fit(:\n")
    with pytest.raises(SpecError, match=r"broken\.py:2"):
        find_code("broken:S", [str(tmp_path)])
    (tmp_path / "large.py").write_text("#" * 2_000_001)
    with pytest.raises(SpecError, match="2,000,001 bytes"):
        find_code("large:S", [str(tmp_path)])


def test_inherited_methods_are_for_the_worker_to_find(code, tmp_path):
    assert find_code("own_words.deep.scorers:Child", [str(tmp_path)]).name.endswith(":Child")


def test_sequences_are_scored_by_their_text(code):
    made = OwnTokenScorer(
        code, {"factor": 2}, {"mean": np.array([1.0])}, Words(), grain="sequences"
    )
    scores = made.score(tokens(["a b c ", "abcdef"], [[("0", 0, 6)], [("1", 0, 6)]]))
    assert scores["value"].to_pylist() == [5.0, 1.0]
    assert scores["piece_nll_sum"].null_count == 2


def test_documents_are_scored_whole(code):
    made = OwnTokenScorer(code, {}, {"mean": np.array([0.0])}, Words(), grain="documents")
    table = tokens(["a b c ", "d efgh"], [[("0", 0, 6)], [("0", 0, 2), ("1", 2, 6)]])
    scores = made.score(table)
    # the first document has 4 words; its 5 + 1 predicted positions carry 4 each
    sums, counts = scores["piece_nll_sum"].to_pylist(), scores["piece_tokens"].to_pylist()
    means = [[s / n for s, n in zip(*row, strict=True)] for row in zip(sums, counts, strict=True)]
    assert means == [[4.0], [4.0, 1.0]]


def test_errors_of_the_code_say_where(code):
    made = OwnTokenScorer(code, {}, {"mean": np.array([0.0])}, Words(), grain="sequences")
    with pytest.raises(ScorerError) as failed:
        made.score(tokens(["boom"], [[("0", 0, 4)]]))
    said = str(failed.value)
    assert "failed in `score`: ValueError: no booms (own_words/deep/scorers.py:1" in said
    with pytest.raises(ScorerError, match=r"shape \(1, 2\) for 1 texts"):
        made.score(tokens(["wide"], [[("0", 0, 4)]]))
    with pytest.raises(ScorerError, match="cannot be made: TypeError"):
        code.build({"colour": 1})
    with pytest.raises(ScorerError, match="failed in `load`: KeyError: 'mean'"):
        OwnTokenScorer(code, {}, {}, Words(), grain="sequences")


def test_what_is_learned_is_arrays_of_numbers(code):
    class Objects:
        def fit(self, target, pool):
            return {"words": json.dumps([])}

    with pytest.raises(ScorerError, match="'words' as str"):
        fit(code, Objects(), [], [])
    assert fit(code, code.build({}), ["a b", "a b c d"], [])["mean"].tolist() == [3.0]
