"""Scores that two writers make: adopted where devices round, refused where they say otherwise."""

from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pytest

from stillhouse.errors import ArtifactError
from stillhouse.selection.scorers import LanguageModelScorer, ScoreTask, agree
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.storage.task import commit
from stillhouse.text.packing import tokens_schema

LENGTH = 4
DOCUMENTS = tokens_schema(LENGTH, np.uint16).field("documents").type
NAN = float("nan")


class Losses:
    """Some losses, as a device would give them."""

    micro_batch = 8

    def __init__(self, offset):
        self.offset = offset

    def token_nll(self, input_ids):
        return np.full((len(input_ids), LENGTH - 1), 2.0 + self.offset, np.float32)


@pytest.fixture
def score(tmp_path):
    """Scores a part of two sequences with losses that are off by something: its receipt."""
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.uint16)), LENGTH)
    piece = {"id": "a", "source": "s", "start": 0, "end": LENGTH, "file": 0, "row": 0}
    tokens = pa.table({"input_ids": ids, "documents": pa.array([[piece], [piece]], DOCUMENTS)})
    store = Store(str(tmp_path))
    task = ScoreTask("model", PartRef("tokens/parts/a.parquet", 2, 8, 1, "0" * 64))

    def call(offset, dtype="float32"):
        scorer = LanguageModelScorer(Losses(offset), "cpu", dtype)
        return commit(store, task, task.run(store, scorer, tokens))

    return call


def test_what_made_it_is_recorded(score):
    made_by = {"device": "cpu", "dtype": "float32", "micro_batch": 8}
    assert score(0).info == made_by | {"torch": version("torch")} | {
        name: version(name) for name in ("transformers", "tokenizers", "pyarrow")
    }


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_scores_that_differ_by_rounding_are_adopted(score, dtype, offset):
    assert score(offset, dtype).parts == score(0, dtype).parts


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 1e-2), ("bfloat16", 0.5)])
def test_other_scores_under_the_same_name_are_refused(score, dtype, offset):
    score(0, dtype)
    with pytest.raises(ArtifactError, match=r"scores/parts/.* has other values than are made"):
        score(offset, dtype)


def table(values, sums, tokens):
    return pa.table(
        {
            "value": pa.array(values, pa.float32()),
            "piece_nll_sum": pa.array(sums, pa.list_(pa.float32())),
            "piece_tokens": pa.array(tokens, pa.list_(pa.int32())),
        }
    )


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (table([1.0, NAN], [[3.0], [1.0, 2.0]], [[3], [1, 2]]), True),
        (table([1.00005, NAN], [[3.0], [1.0, 2.0]], [[3], [1, 2]]), True),
        (table([1.001, NAN], [[3.0], [1.0, 2.0]], [[3], [1, 2]]), False),
        (table([1.0, 1.0], [[3.0], [1.0, 2.0]], [[3], [1, 2]]), False),
        (table([1.0, NAN], [[3.0], [1.0, 2.1]], [[3], [1, 2]]), False),
        (table([1.0, NAN], [[3.0], [1.0]], [[3], [1]]), False),
        (table([1.0, NAN], [[3.0], [1.0, 2.0]], [[3], [2, 1]]), False),
    ],
)
def test_tables_agree_value_by_value(other, expected):
    mine = table([1.0, NAN], [[3.0], [1.0, 2.0]], [[3], [1, 2]])
    assert agree(mine, other, 1e-4) == expected


def test_tables_without_pieces_agree():
    mine = table([1.0], [None], [None])
    assert agree(mine, mine, 1e-4)
