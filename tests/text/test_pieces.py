import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.text.documents import Document
from stillhouse.text.packing import Packer, tokens_table
from stillhouse.text.pieces import read_pieces, token_ids

LENGTH = 4
LENGTHS = st.lists(st.integers(0, 11), min_size=1, max_size=10)


def table_of(lengths):
    packer = Packer(sequence_length=LENGTH, eos_id=0, dtype=np.uint16, part_rows=1000)
    for row, count in enumerate(lengths):
        source = "ab"[row % 2]
        packer.add(
            Document(row % 3, row, f"d{row}", source, ""), np.full(count, row + 1, np.uint32)
        )
    return tokens_table(packer.finish())


@given(LENGTHS)
def test_pieces_are_the_rows_of_the_table(lengths):
    table = table_of(lengths)
    pieces = read_pieces(table)
    flat = [(i, piece) for i, row in enumerate(table["documents"].to_pylist()) for piece in row]
    assert pieces.sequence.tolist() == [i for i, _ in flat]
    for name in ("start", "end", "file", "row"):
        assert getattr(pieces, name).tolist() == [piece[name] for _, piece in flat]
    assert [pieces.sources[i] for i in pieces.source] == [piece["source"] for _, piece in flat]
    assert pieces.ids.to_pylist() == [piece["id"] for _, piece in flat]
    assert np.diff(pieces.offsets).tolist() == [len(row) for row in table["documents"].to_pylist()]
    assert pieces.num_tokens.sum() == LENGTH * table.num_rows


@given(LENGTHS)
def test_a_piece_owns_its_documents_tokens(lengths):
    table = table_of(lengths)
    pieces, ids = read_pieces(table), token_ids(table)
    for i, sequence in enumerate(pieces.sequence):
        mine = ids[sequence, pieces.start[i] : pieces.end[i]]
        assert set(mine.tolist()) <= {0, pieces.row[i] + 1}  # its own tokens and its EOS
    rows = pieces.row[np.flatnonzero(np.diff(pieces.owners(), prepend=-1))]
    assert rows.tolist() == sorted(set(rows.tolist()))


@given(LENGTHS, st.integers(0, 3))
def test_slices_and_chunks_read_the_same(lengths, cut):
    table = table_of(lengths)
    whole = token_ids(table)
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    assert token_ids(pieces).tolist() == whole.tolist()
    assert read_pieces(pieces).start.tolist() == read_pieces(table).start.tolist()
    part = table.slice(cut)
    assert token_ids(part).tolist() == whole[cut:].tolist()
    assert (
        len(read_pieces(part).start)
        == read_pieces(table).offsets[len(whole)]
        - (read_pieces(table).offsets[min(cut, len(whole))])
    )
