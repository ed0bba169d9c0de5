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
    assert packer.add(Document(0, 5, "a", "x", ""), np.array([1, 2, 3, 4, 5])) is None
    assert packer.add(Document(1, 7, "b", "y", ""), np.array([6, 7])) is None
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
    assert (token_dtype(65_536), token_dtype(65_537)) == (np.uint16, np.uint32)
    assert str(schema.field("input_ids").type) == "fixed_size_list<item: uint32>[2]"
    assert str(schema.field("documents").type) == (
        "list<item: struct<id: string, source: string, start: int32, end: int32, "
        "file: int32, row: int64>>"
    )


@given(TEXTS, st.integers(1, 9), st.integers(1, 5))
def test_every_part_is_the_naive_stream_of_its_documents(token_lists, length, part_rows):
    packer = Packer(sequence_length=length, eos_id=EOS, dtype=np.uint16, part_rows=part_rows)
    parts, groups, group = [], [], []
    for document, ids in documents_of(token_lists):
        group.append(ids.tolist())
        full = packer.add(document, ids)
        assert (full is not None) == (sum(map(len, group)) + len(group) >= part_rows * length)
        if full is not None:
            parts.append(full)
            groups.append(group)
            group = []
    parts.append(packer.finish())
    groups.append(group)
    dropped = first = 0
    for part, group in zip(parts, groups, strict=True):
        dropped += check_part(tokens_table(part).to_pylist(), group, first, length)
        first += len(group)
    assert packer.remainder_tokens == dropped
    rows = [row for part in parts for row in tokens_table(part).to_pylist()]
    there = {piece["row"] for row in rows for piece in row["documents"]}
    assert packer.remainder_documents == len(token_lists) - len(there)
    assert packer.num_rows == sum(len(part.input_ids) for part in parts)


def check_part(rows, group, first, length):
    """Compare a part with its documents joined by hand; the number of tokens it drops."""
    stream, owners, num_rows = naive(group, length)
    kept = [token for row in rows for token in row["input_ids"]]
    assert kept == stream[: num_rows * length]
    assert len(rows) == num_rows
    for i, row in enumerate(rows):
        edges = [(piece["start"], piece["end"]) for piece in row["documents"]]
        assert [0, *(end for _, end in edges)] == [*(start for start, _ in edges), length]
        assert all(start < end for start, end in edges)
        claimed = [p["row"] - first for p in row["documents"] for _ in range(p["start"], p["end"])]
        assert claimed == owners[i * length : (i + 1) * length]
        for piece in row["documents"]:
            owner = piece["row"]
            assert piece["id"] == f"d{owner}"
            assert piece["source"] == f"s{owner % 2}"
            assert piece["file"] == owner % 3
        assert len({piece["row"] for piece in row["documents"]}) == len(edges)
    return len(stream) - len(kept)


def test_tables_concatenate_and_stay_valid():
    packed = pack(
        Packer(sequence_length=5, eos_id=EOS, dtype=np.uint16, part_rows=3),
        ((document, ids, None) for document, ids in documents_of([[1, 2, 3]] * 20)),
    )
    table = pa.concat_tables(map(tokens_table, packed))
    table.validate(full=True)
    assert table.num_rows == 15
