"""Streaming batches from parts on disk: from any step, for any number of workers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import step_samples
from training_parts import LENGTH, write_part

from stillhouse.errors import ArtifactError
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.schedule import Schedule
from stillhouse.training.stream import TokenStream

BATCH, LANES = 8, 4
PART_ROWS = [13, 40, 7, 22]


def ids_of(part, rows):
    """A sequence says where it comes from: [part, row, 0, 1, 2, 3]."""
    ids = np.zeros((rows, LENGTH), np.uint16)
    ids[:, 0], ids[:, 1], ids[:, 2:] = part, np.arange(rows), np.arange(4)
    return ids


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    uris = [str(folder / f"{i}.parquet") for i in range(len(PART_ROWS))]
    for i, (uri, rows) in enumerate(zip(uris, PART_ROWS, strict=True)):
        write_part(uri, ids_of(i, rows), ["sea", f"s{i}"])
    return uris


class Counting(PartReader):
    """Keeps the windows that were read."""

    def __init__(self, uris):
        super().__init__(uris)
        self.windows = []

    def read(self, window):
        self.windows.append(window)
        return super().read(window)


def order_of(sets=(tuple(PART_ROWS),), weights=(1.0,), window=6, seed=0):
    rows = [Rows(s, w) for s, w in zip(sets, weights, strict=True)]
    return SampleOrder(rows, global_batch=BATCH, seed=seed, lanes=LANES, window=window)


def stream(uris, rank=0, num_workers=1, order=None, reader=None, num_steps=None):
    fetch, size = read_ahead(reader or PartReader(uris), 4), num_workers
    return TokenStream(order or order_of(), fetch, rank=rank, num_workers=size, num_steps=num_steps)


def steps(streams, count):
    """`count` global batches: samples and ids of the workers, one after another."""
    found = []
    for _ in range(count):
        batches = [s.next_batch() for s in streams]
        ids = np.concatenate([b.inputs.numpy() for b in batches])
        samples = np.concatenate([b.samples for b in batches])
        found.append((samples.tolist(), ids.tolist()))
    return found


def test_ids_belong_to_their_samples(parts):
    with_ids = steps([stream(parts)], 25)  # 82 rows: into the third epoch
    for samples, ids in with_ids:
        assert [row[:2] for row in ids] == samples
        assert all(row[2:] == [0, 1, 2, 3] for row in ids)
    assert str(stream(parts).next_batch().inputs.dtype) == "torch.int64"


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_workers_share_the_global_batch(parts, num_workers):
    alone = steps([stream(parts)], 14)
    shared = [stream(parts, rank, num_workers) for rank in range(num_workers)]
    assert steps(shared, 14) == alone


def test_resumes_at_any_step_with_another_number_of_workers(parts):
    whole = steps([stream(parts)], 14)
    for cut in range(14):
        before = [stream(parts, rank, 2) for rank in range(2)]
        head = steps(before, cut)
        states = [json.loads(json.dumps(s.state_dict())) for s in before]
        assert states[0] == states[1] and states[0]["consumed"] == cut * BATCH
        after = [stream(parts, rank, 4) for rank in range(4)]
        for worker in after:
            worker.load_state_dict(states[0])
        assert head + steps(after, 14 - cut) == whole, f"cut at {cut}"


def test_seeking_reads_only_what_comes(parts):
    reader = Counting(parts)
    there = stream(parts, reader=reader)
    there.load_state_dict(there.state_dict() | {"consumed": 7 * BATCH})
    reader.windows.clear()
    there.next_batch()
    there.close()
    assert all(window.end > 14 for window in reader.windows)
    assert {window.lane for window in reader.windows} == {0, 1, 2, 3}


def test_windows_are_read_once_and_a_part_by_one_worker_but_at_borders_of_lanes(parts):
    reader = Counting(parts)
    there = stream(parts, reader=reader)
    steps([there], 12)
    there.close()
    names = [(w.lane, w.start) for w in reader.windows]
    assert len(names) == len(set(names))
    rows_ahead = sum(window.num_rows for window in reader.windows) - 12 * BATCH
    assert rows_ahead <= (LANES + 3) * 6
    readers = [Counting(parts), Counting(parts)]
    steps([stream(parts, rank, 2, reader=readers[rank]) for rank in range(2)], 8)
    read = [
        {span.part for window in reader.windows if window.epoch == 0 for span in window.spans}
        for reader in readers
    ]
    assert len(read[0] & read[1]) <= 1


def test_the_owner_of_every_token(parts):
    for _ in range(3):
        batch = stream(parts).next_batch()
        names = np.array(batch.sources.names)[batch.sources.codes]
        for (part, row), found in zip(batch.samples, names.tolist(), strict=True):
            own = ["sea", f"s{part}"]
            assert found == [own[row % 2]] * 2 + [own[(row + 1) % 2]] * 4
    assert batch.sources.present() == sorted(batch.sources.names)


def test_tokens_without_documents_are_of_their_data_set(tmp_path):
    write_part(tmp_path / "a.parquet", ids_of(0, 20), None)
    fetch = read_ahead(PartReader([str(tmp_path / "a.parquet")]), 4)
    batch = TokenStream(order_of([[20]]), fetch, names=["web"]).next_batch()
    assert batch.sources.present() == ["web"] and batch.sources.codes.shape == (BATCH, LENGTH)


def test_a_mixture_takes_its_shares(parts):
    order = order_of([PART_ROWS[:2], PART_ROWS[2:]], [3.0, 1.0])
    alone = steps([stream(parts, order=order)], 64)
    assert steps([stream(parts, rank, 2, order) for rank in range(2)], 64) == alone
    drawn = np.array([sample for samples, _ in alone for sample in samples])
    assert all(row[:2] == sample for s, ids in alone for sample, row in zip(s, ids, strict=True))
    assert abs((drawn[:, 0] >= 2).mean() - 0.25) < 0.05
    resumed = stream(parts, 1, 2, order)
    resumed.load_state_dict(resumed.state_dict() | {"consumed": 40 * BATCH})
    assert [s[BATCH // 2 :] for s, _ in alone[40:44]] == [s for s, _ in steps([resumed], 4)]


def test_swapped_rows_of_a_file_are_swapped_in_training(parts, tmp_path):
    """The order goes by rows, not by content."""
    ids = ids_of(1, PART_ROWS[1])
    ids[[3, 30]] = ids[[30, 3]]
    write_part(str(tmp_path / "1.parquet"), ids, ["sea", "s1"])
    copies = [parts[0], str(tmp_path / "1.parquet"), *parts[2:]]
    whole, swapped = steps([stream(parts)], 10), steps([stream(copies)], 10)
    assert [s for s, _ in whole] == [s for s, _ in swapped]
    changed = {
        tuple(sample): tuple(other[:2])
        for (samples, one), (_, two) in zip(whole, swapped, strict=True)
        for sample, row, other in zip(samples, one, two, strict=True)
        if row != other
    }
    assert changed == {(1, 3): (1, 30), (1, 30): (1, 3)}


def test_a_state_of_another_order_is_refused(parts):
    state = stream(parts).state_dict()
    with pytest.raises(ArtifactError, match="order with `seed` 0, this one has 5"):
        stream(parts, order=order_of(seed=5)).load_state_dict(state)


@pytest.mark.parametrize(
    ("odd", "message"), [(-1, "token id -1"), (64, "token id 64"), (None, "nulls")]
)
def test_token_ids_that_no_model_has(tmp_path, odd, message):
    rows = [[1] * LENGTH for _ in range(20)]
    rows[7][3] = odd
    column = pa.array(rows, pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": column}), tmp_path / "a.parquet")
    fetch = read_ahead(PartReader([str(tmp_path / "a.parquet")]), 4)
    with pytest.raises(ArtifactError, match=message):
        steps([TokenStream(order_of([[20]]), fetch, vocab_size=64)], 5)


def test_broken_parts(parts, tmp_path):
    missing = stream([*parts[:3], str(tmp_path / "no.parquet")])
    with pytest.raises(ArtifactError, match=r"no.parquet is missing"):
        steps([missing], 10)
    (tmp_path / "cut.parquet").write_bytes(Path(parts[3]).read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"cut.parquet is broken"):
        steps([stream([*parts[:3], str(tmp_path / "cut.parquet")])], 10)
    with pytest.raises(ArtifactError, match="run `stillhouse verify`"):
        steps([stream([parts[1], parts[1], parts[2], parts[2]])], 10)


def test_weights_that_change_resume_at_any_step_with_another_number_of_workers(parts):
    sets, ends = (tuple(PART_ROWS[:2]), tuple(PART_ROWS[2:])), 12
    ramp = Schedule(((0.0, 3.0), (0.5, 1.0), (0.8, 0.0)), linear=True)
    rows = [Rows(sets[0], ramp), Rows(sets[1], max_epochs=9)]
    options = {"global_batch": BATCH, "seed": 0, "lanes": LANES, "window": 6}
    order = SampleOrder(rows, num_steps=ends, **options)
    whole = steps([stream(parts, order=order, num_steps=ends)], ends)
    assert [samples for samples, _ in whole] == [
        [list(sample) for sample in step_samples(order, step)] for step in range(ends)
    ]
    for cut in range(ends):
        before = [stream(parts, rank, 2, order=order, num_steps=ends) for rank in range(2)]
        head = steps(before, cut)
        state = json.loads(json.dumps(before[0].state_dict()))
        after = [stream(parts, rank, 4, order=order, num_steps=ends) for rank in range(4)]
        for worker in after:
            worker.load_state_dict(state)
        assert head + steps(after, ends - cut) == whole, f"cut at {cut}"
    other = SampleOrder([Rows(sets[0]), Rows(sets[1])], **options)
    with pytest.raises(ArtifactError, match="in an order with `weights`"):
        stream(parts, order=other).load_state_dict(state)
