"""Windows through Ray Data: the same tables in the same order as read one by one."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.errors import ArtifactError
from stillhouse.pipelines.fetch import stream_windows
from stillhouse.training.fetch import PartReader
from stillhouse.training.order import Rows, SampleOrder

PART_ROWS = (50, 30, 40)


@pytest.fixture
def uris(tmp_path):
    found = [str(tmp_path / f"{i}.parquet") for i in range(len(PART_ROWS))]
    for i, (uri, rows) in enumerate(zip(found, PART_ROWS, strict=True)):
        ids = pa.array(np.arange(rows * 4, dtype=np.uint16) + 1000 * i)
        table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(ids, 4)})
        pq.write_table(table, uri, row_group_size=16)
    return found


def windows():
    order = SampleOrder([Rows(PART_ROWS)], global_batch=8, seed=0, lanes=4, window=9)
    return order.windows(range(1, 3), 0, 30)


def test_every_window_whole_and_in_order(ray_cluster, uris):
    read = PartReader(uris)
    wanted = [read.read(window).to_pydict() for window in windows()]
    found = [table.to_pydict() for table in stream_windows(PartReader(uris), direct=2)(windows())]
    assert len(wanted) > 10 and found == wanted


@pytest.mark.soak
def test_a_broken_part_is_named(ray_cluster, uris):
    """The part that the first window of lane 2 is in."""
    Path(uris[0]).write_bytes(b"PAR1 no more")
    with pytest.raises(ArtifactError, match=r"part .*0\.parquet is broken"):
        list(stream_windows(PartReader(uris), direct=0)(windows()))


def test_no_ray_where_the_first_windows_are_all(uris, monkeypatch):
    """Nothing of Ray Data is started: its session would be told by an address that is not there."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    read = PartReader(uris)
    found = list(stream_windows(PartReader(uris), direct=100)(windows()))
    assert [t.num_rows for t in found] == [read.read(w).num_rows for w in windows()]
