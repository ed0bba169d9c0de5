import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.text.documents import Document
from stillhouse.text.packing import Packer, pack, token_dtype, tokens_schema, tokens_table

EOS = 0
TEXTS = st.lists(st.lists(st.integers(1, 300), max_size=40), max_size=12)


def documents_of(token_lists):
    return [
        (Document(i % 3, i, f"d{i}", f"s{i % 2}", ""), np.array(ids, np.uint32))
        for i, ids in enumerate(token_lists)
    ]


def rows_of(tables):
    return [row for table in tables for row in table.to_pylist()]


def naive(token_lists, length):
    """Owner of each token of the joined stream, and the stream itself."""
    stream, owners = [], []
    for i, ids in enumerate(token_lists):
        stream += [*ids, EOS]
        owners += [i] * (len(ids) + 1)
    return stream, owners, len(stream) // length


def test_two_documents_in_sequences_of_four():
    packer = Packer(sequence_length=4, eos_id=EOS, dtype=np.uint16, part_rows=8)
    assert packer.add(Document(0, 5, "a", "x", ""), np.array([1, 2, 3, 4, 5])) == []
    assert packer.add(Document(1, 7, "b", "y", ""), np.array([6, 7])) == []
    table = tokens_table(packer.finish())
    a = {"id": "a", "source": "x", "file": 0, "row": 5}
    b = {"id": "b", "source": "y", "file": 1, "row": 7}
    assert table.to_pylist() == [
        {"input_ids": [1, 2, 3, 4], "documents": [{**a, "start": 0, "end": 4}]},
        {
            "input_ids": [5, EOS, 6, 7],
            "documents": [{**a, "start": 0, "end": 2}, {**b, "start": 2, "end": 4}],
        },
    ]
    assert (packer.num_rows, packer.remainder_tokens) == (2, 1)


def test_schema_is_the_contract():
    packed = Packer(sequence_length=2, eos_id=EOS, dtype=np.uint32, part_rows=1).finish()
    schema = tokens_table(packed).schema
    assert schema == tokens_schema(2, np.uint32)
    assert str(schema.field("input_ids").type) == "fixed_size_list<item: uint32>[2]"
    assert str(schema.field("documents").type) == (
        "list<item: struct<id: string, source: string, start: int32, end: int32, "
        "file: int32, row: int64>>"
    )


def test_token_dtype_at_the_border():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_one_document_larger_than_several_parts():
    packer = Packer(sequence_length=2, eos_id=EOS, dtype=np.uint16, part_rows=2)
    full = packer.add(Document(0, 0, "a", "x", ""), np.arange(1, 11))
    assert [part.input_ids.tolist() for part in full] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert packer.finish().input_ids.tolist() == [[9, 10]]
    assert packer.remainder_tokens == 1


@given(TEXTS, st.integers(1, 9), st.integers(1, 5))
def test_against_the_naive_stream(token_lists, length, part_rows):
    packer = Packer(sequence_length=length, eos_id=EOS, dtype=np.uint16, part_rows=part_rows)
    parts = [p for d, ids in documents_of(token_lists) for p in packer.add(d, ids)]
    assert all(len(part.input_ids) == part_rows for part in parts)
    rows = rows_of(tokens_table(part) for part in [*parts, packer.finish()])

    stream, owners, num_rows = naive(token_lists, length)
    kept = [token for row in rows for token in row["input_ids"]]
    assert kept == stream[: num_rows * length]
    assert packer.num_rows == num_rows == len(rows)
    assert packer.remainder_tokens == len(stream) - len(kept)

    for i, row in enumerate(rows):
        edges = [(piece["start"], piece["end"]) for piece in row["documents"]]
        assert [0, *(end for _, end in edges)] == [*(start for start, _ in edges), length]
        assert all(start < end for start, end in edges)
        claimed = [p["row"] for p in row["documents"] for _ in range(p["start"], p["end"])]
        assert claimed == owners[i * length : (i + 1) * length]
        for piece in row["documents"]:
            owner = piece["row"]
            assert piece["id"] == f"d{owner}"
            assert piece["source"] == f"s{owner % 2}"
            assert piece["file"] == owner % 3
        assert len({piece["row"] for piece in row["documents"]}) == len(edges)


@given(TEXTS, st.integers(1, 9), st.integers(1, 5))
def test_parts_are_only_a_cut_of_the_same_rows(token_lists, length, part_rows):
    def rows(part_rows):
        packed = pack(
            documents_of(token_lists),
            sequence_length=length,
            eos_id=EOS,
            dtype=np.uint16,
            part_rows=part_rows,
        )
        return rows_of(map(tokens_table, packed))

    assert rows(part_rows) == rows(1000)


def test_tables_concatenate_and_stay_valid():
    packed = pack(
        documents_of([[1, 2, 3]] * 20), sequence_length=5, eos_id=EOS, dtype=np.uint16, part_rows=3
    )
    table = pa.concat_tables(map(tokens_table, packed))
    table.validate(full=True)
    assert table.num_rows == 16
