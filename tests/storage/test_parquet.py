"""A flipped bit in a page is an error, whoever reads it."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import ArtifactError, BadFileError
from stillhouse.reading.torch_reader import SelectionDataset
from stillhouse.storage.artifact import Part
from stillhouse.storage.parquet import open_part, parquet_bytes, read_table
from stillhouse.text.records import read_records
from stillhouse.training.fetch import PartReader
from stillhouse.training.order import Span, Window

IDS = np.arange(400 * 8, dtype=np.uint16).reshape(400, 8)
TABLE = pa.table(
    {
        "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(IDS.ravel()), 8),
        "value": pa.array(np.linspace(0, 1, 400, dtype=np.float32)),
        "text": [f"text {i}" for i in range(400)],
    }
)


def pages(data):
    """Where the pages of each column chunk lie in a file: (first byte, last byte + 1)."""
    footer = pq.read_metadata(pa.BufferReader(data))
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            chunk = footer.row_group(group).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            yield start, start + chunk.total_compressed_size


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def everywhere(data):
    """The file with one bit flipped, for twelve places of each column chunk."""
    for first, end in pages(data):
        for place in np.linspace(first, end - 1, 12).astype(int):
            yield flipped(data, int(place))


def by_row_group(path):
    with open_part(path) as file:
        return file.read_row_group(0)


def test_no_flip_is_read_as_other_values(tmp_path):
    data, path = parquet_bytes(TABLE), tmp_path / "a.parquet"
    for read in (read_table, by_row_group):
        found = []
        for broken in everywhere(data):
            path.write_bytes(broken)
            try:
                found.append(read(str(path)).equals(TABLE))
            except ArtifactError:
                found.append("refused")
        assert set(found) <= {"refused", True}  # a page's header has bits that mean nothing
        assert found.count("refused") >= len(found) - 4


@pytest.fixture
def rotten(tmp_path):
    """A file whose column of tokens has a flipped bit in the middle."""
    data = parquet_bytes(TABLE)
    first, end = next(iter(pages(data)))
    path = tmp_path / "rotten.parquet"
    path.write_bytes(flipped(data, (first + end) // 2))
    return path


def test_training_reads_no_flipped_page(rotten):
    with pytest.raises(ArtifactError, match=r"part .*rotten\.parquet is broken"):
        PartReader([str(rotten)]).read(Window(0, 0, 0, 0, 0, 0, (Span(0, 0, 10),)))


def test_the_torch_reader_reads_no_flipped_page(rotten):
    part = Part(str(rotten), 400, 3200, 0, "")
    with pytest.raises(ArtifactError, match=r"part .*rotten\.parquet is broken"):
        list(SelectionDataset([part], 0, 1, 0, 0, None))


def test_a_users_file_with_checksums_is_checked(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer, write_page_checksum=True)
    data = buffer.getvalue()
    first, end = list(pages(data))[2]
    path = Path(tmp_path, "pool.parquet")
    path.write_bytes(flipped(data, (first + end) // 2))
    with pytest.raises(BadFileError, match=r"pool\.parquet: cannot be read"):
        list(read_records(str(path), lambda _: TABLE.column_names, text="text", max_chars=10))
