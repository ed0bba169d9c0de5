import numpy as np
import pytest
from mixing_world import rows_of, source_task, write_rows, write_tokenizer

from stillhouse.errors import ArtifactError
from stillhouse.mixing.arms import ArmPart, ArmReader
from stillhouse.mixing.preparation import prepare_source
from stillhouse.storage.artifact import Store


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Forty arms of different sizes."""
    folder = tmp_path_factory.mktemp("arms")
    words = write_tokenizer(folder)
    store = Store(str(folder / "store"))
    rows = [r | {"task": f"arm{i:02}"} for i in range(40) for r in rows_of("other", 5 + 20 * i, i)]
    task = source_task("many", write_rows(folder / "many.parquet", rows), by="task")
    receipt = prepare_source(store, words, task)
    names = [arm["name"] for arm in receipt.info["arms"]]
    refs = zip(names, receipt.parts, strict=True)
    return [ArmPart(name, store.path(part.path), part.num_rows) for name, part in refs]


def test_arms_on_s3_are_read_where_they_are_drawn(parts, bucket):
    import s3fs

    files = s3fs.S3FileSystem()
    there = []
    for part in parts:
        uri = f"{bucket}/{part.name}.parquet"
        files.put(part.uri, uri)
        there.append(ArmPart(part.name, uri, part.num_rows))
    remote, local = ArmReader(there, seed=0), ArmReader(parts, seed=0)
    remote.ahead(3, 0, 8)
    assert ids(remote.rows(3, 0, 8)) == ids(local.rows(3, 0, 8))
    assert ids(remote.rows(39, 700, 99)) == ids(local.rows(39, 700, 99))
    assert remote.opened == [3, 39]
    remote.close()


def ids(rows):
    return [(*row.input_ids, -1, *row.target_ids) for row in rows]


def test_an_epoch_holds_every_row_once_and_each_has_its_own_order(parts):
    reader = ArmReader(parts, seed=0)
    size = parts[39].num_rows
    assert size == 785  # four row groups
    first, second = ids(reader.rows(39, 0, size)), ids(reader.rows(39, size, size))
    assert sorted(first) == sorted(second) and first != second
    assert ids(ArmReader(parts, seed=1).rows(39, 0, size)) != first


def test_a_place_in_the_stream_is_arithmetic(parts):
    reader, other = ArmReader(parts, seed=3), ArmReader(parts, seed=3)
    whole = ids(reader.rows(7, 0, 400))
    for start in (390, 17, 250):
        other.ahead(7, start, 10)
        assert ids(other.rows(7, start, 10)) == whole[start : start + 10]


def test_an_arm_is_opened_when_it_is_drawn(parts):
    reader = ArmReader(parts, seed=0)
    assert reader.opened == []
    reader.rows(5, 0, 4)
    reader.rows(2, 0, 4)
    assert reader.opened == [2, 5]


def test_memory_is_bounded(parts, monkeypatch):
    monkeypatch.setattr("stillhouse.mixing.arms._CACHE_BYTES", 10_000)
    reader = ArmReader(parts, seed=0)
    for arm in range(40):
        reader.rows(arm, 0, 5)
    assert reader._num_bytes == sum(size for _, size in reader._groups.values()) <= 10_000


def test_a_part_that_is_gone_is_named(parts):
    reader = ArmReader([ArmPart("a", "/nowhere/a.parquet", 3)], seed=0)
    with pytest.raises(ArtifactError, match=r"/nowhere/a\.parquet is missing though"):
        reader.rows(0, 0, 1)


def test_rows_are_int32(parts):
    row = ArmReader(parts, seed=0).rows(0, 0, 1)[0]
    assert row.input_ids.dtype == np.int32 and len(row.target_ids) > 0
