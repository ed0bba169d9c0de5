"""Arms as streams of rows: any position, read where and when its arm is drawn."""

from dataclasses import replace

import numpy as np
import pytest
from mixing_world import prepare, rows_of, source_task, write_rows, write_tokenizer

from stillhouse.errors import ArtifactError
from stillhouse.mixing.arms import ArmPart, ArmReader
from stillhouse.storage.artifact import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with forty arms of different sizes."""
    folder = tmp_path_factory.mktemp("arms")
    tokenizer = write_tokenizer(folder)
    store = Store(str(folder / "store"))
    rows = [r | {"task": f"arm{i:02}"} for i in range(40) for r in rows_of("other", 5 + 20 * i, i)]
    task = source_task("many", write_rows(folder / "many.parquet", rows), by="task")
    receipt = prepare(store, tokenizer, task)
    pairs = zip(receipt.info["arms"], receipt.parts, strict=True)
    return store, [ArmPart(arm["name"], part.path, part.num_rows) for arm, part in pairs]


def ids(rows):
    return [(*row.input_ids, -1, *row.target_ids) for row in rows]


def test_arms_on_s3_are_read_where_they_are_drawn(made, bucket):
    import s3fs

    store, parts = made
    moved = [replace(part, path=f"{part.name}.parquet") for part in parts]
    for arm in (3, 39):
        s3fs.S3FileSystem().put(store.path(parts[arm].path), f"{bucket}/{moved[arm].path}")
    remote, local = ArmReader(Store(bucket), moved, seed=0), ArmReader(store, parts, seed=0)
    assert remote.opened == []
    remote.ahead(3, 0, 8)
    assert ids(remote.rows(3, 0, 8)) == ids(local.rows(3, 0, 8))
    assert ids(remote.rows(39, 700, 99)) == ids(local.rows(39, 700, 99))
    assert remote.opened == [3, 39]
    remote.close()


def test_an_epoch_holds_every_row_once_and_any_position_can_be_read(made):
    reader, size = ArmReader(*made, seed=0), made[1][39].num_rows
    assert size == 785  # four row groups
    rows = reader.rows(39, 0, size)
    assert rows[0].input_ids.dtype == np.int32 and len(rows[0].target_ids) > 0
    first, second = ids(rows), ids(reader.rows(39, size, size))
    assert sorted(first) == sorted(second) and first != second
    assert ids(ArmReader(*made, seed=1).rows(39, 0, size)) != first
    other = ArmReader(*made, seed=0)
    for start in (390, 17, 775):
        other.ahead(39, start, 20)
        assert ids(other.rows(39, start, 20)) == (first + second)[start : start + 20]


def test_memory_is_bounded(made, monkeypatch):
    monkeypatch.setattr("stillhouse.mixing.arms._CACHE_BYTES", 10_000)
    reader = ArmReader(*made, seed=0)
    for arm in range(40):
        reader.rows(arm, 0, 5)
    assert reader._num_bytes == sum(size for _, size in reader._groups.values()) <= 10_000


def test_a_missing_part_is_named(tmp_path):
    reader = ArmReader(Store(str(tmp_path)), [ArmPart("a", "a.parquet", 3)], seed=0)
    with pytest.raises(ArtifactError, match=r"/a\.parquet is missing though"):
        reader.rows(0, 0, 1)
