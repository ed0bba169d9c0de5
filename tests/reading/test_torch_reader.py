import json
from itertools import accumulate, chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import LENGTH, NUM_ROWS, SIZES, put_selection
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import open_selection
from stillhouse.storage.artifact import Store


@pytest.fixture
def selection(store):
    return open_selection(put_selection(store))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return open_selection(put_selection(Store(str(tmp_path_factory.mktemp("store")))))


def numbers(dataset):
    """Which rows came, in order: row i begins with token 10 i."""
    return [
        int(item["input_ids"].reshape(-1, LENGTH)[j, 0]) // 10
        for item in dataset
        for j in _rows(item)
    ]


def _rows(item):
    return range(item["input_ids"].numel() // LENGTH)


def test_order_is_fixed_by_seed_and_epoch(selection):
    rows = [row["input_ids"] for row in selection.to_torch()]
    assert all(row.dtype == torch.int64 for row in rows)
    by_start = {int(row[0]): row.tolist() for row in rows}
    assert by_start == {10 * i: [10 * i + j for j in range(4)] for i in range(NUM_ROWS)}
    order = numbers(selection.to_torch(seed=1, epoch=2))
    assert numbers(selection.to_torch(seed=1, epoch=2)) == order
    first = {i: set(range(sum(SIZES[:i]), sum(SIZES[: i + 1]))) for i in range(3)}
    orders = {
        tuple(numbers(selection.to_torch(seed=s, epoch=e))) for s in range(3) for e in range(3)
    }
    assert len(orders) == 9
    for seen in orders:  # whole parts, one after another
        blocks = sorted(first.values(), key=lambda block: seen.index(min(block, key=seen.index)))
        starts = [0, *accumulate(len(block) for block in blocks)]
        assert [set(seen[a:b]) for a, b in pairwise(starts)] == blocks


def test_one_part_has_another_order_in_each_epoch_and_for_each_seed(store):
    """Of 30 rows in row groups of 3, not only the groups are permuted."""
    dataset = open_selection(put_selection(store, sizes=(30,)))
    orders = [tuple(numbers(dataset.to_torch(seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)]
    assert len({*orders}) == 4
    for seen in orders:
        assert sorted(seen) == list(range(30))
        groups = [seen[i : i + 3] for i in range(0, 30, 3)]
        assert all(max(group) - min(group) == 2 and min(group) % 3 == 0 for group in groups)
        assert any(list(group) != sorted(group) for group in groups)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 25), st.integers(1, 9), st.integers(0, 3))
def test_with_drop_last_all_ranks_have_equal_batches(local, world_size, batch_size, seed):
    ranks = [
        local.to_torch(
            rank=r, world_size=world_size, seed=seed, batch_size=batch_size, drop_last=True
        )
        for r in range(world_size)
    ]
    shapes = [[tuple(item["input_ids"].shape) for item in dataset] for dataset in ranks]
    whole = NUM_ROWS // world_size // batch_size
    assert shapes == [[(batch_size, LENGTH)] * whole] * world_size
    given_out = [row for dataset in ranks for row in numbers(dataset)]
    assert len({*given_out}) == len(given_out) == whole * batch_size * world_size
    assert {dataset.dropped_rows for dataset in ranks} == {NUM_ROWS - len(given_out)}


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_its_length_is_what_comes(local, batch_size, num_workers, drop_last):
    for rank in range(2):
        dataset = local.to_torch(
            rank=rank, world_size=2, batch_size=batch_size, drop_last=drop_last
        )
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        came = [item["input_ids"].shape for item in loader]
        assert len(came) == len(dataset) == len(loader)
        if not drop_last and batch_size is not None:
            first, last = NUM_ROWS * rank // 2, NUM_ROWS * (rank + 1) // 2
            assert sum(shape[0] for shape in came) == last - first


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3), st.one_of(st.none(), st.integers(1, 30)))
def test_ranks_share_all_rows(local, world_size, seed, batch_size):
    shares = [
        numbers(local.to_torch(rank=r, world_size=world_size, seed=seed, batch_size=batch_size))
        for r in range(world_size)
    ]
    assert list(chain(*shares)) == numbers(local.to_torch(seed=seed))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("batch_size", [None, 1, 4])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_state_saved_at_every_step_gives_the_rest(local, batch_size, rank, world_size):
    def dataset():
        return local.to_torch(rank=rank, world_size=world_size, seed=3, batch_size=batch_size)

    straight = [item["input_ids"].tolist() for item in dataset()]
    running = dataset()
    states = [running.state_dict()]
    states += [running.state_dict() for _ in running]
    assert len(states) == len(straight) + 1
    for step, state in enumerate(states):
        again = dataset()
        again.load_state_dict(json.loads(json.dumps(state)))
        assert again.state_dict() == state
        assert [item["input_ids"].tolist() for item in again] == straight[step:]


def test_each_iteration_starts_anew(local):
    dataset = local.to_torch()
    next(iter(dataset))
    assert numbers(dataset) == numbers(dataset) == numbers(local.to_torch())


def test_state_of_another_order_is_refused(local):
    state = local.to_torch(seed=1).state_dict()
    for changed in ({"seed": 2}, {"seed": 1, "epoch": 1}, {"seed": 1, "world_size": 2}):
        dataset = local.to_torch(**changed)
        dataset.load_state_dict(state)
        with pytest.raises(ValueError, match="the state was taken with"):
            next(iter(dataset))


def test_finished_parts_are_not_read_again(bucket, proxied):
    selection = open_selection(put_selection(Store(bucket)))
    dataset = selection.to_torch()
    dataset.load_state_dict(dataset.state_dict() | {"rows": 18})
    proxied.requests.clear()
    assert len(numbers(dataset)) == 3
    assert len(proxied.requests) == 2  # size and bytes of the last part


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_state_taken_outside_of_workers_is_refused_by_them(local, num_workers):
    dataset = local.to_torch()
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    next(iter(loader))
    state = dataset.state_dict()  # of the copy in this process, which gave out nothing
    again = local.to_torch()
    again.load_state_dict(state)
    with pytest.raises(ValueError, match="torchdata's StatefulDataLoader"):
        list(DataLoader(again, batch_size=None, num_workers=num_workers))


class _WithStates(IterableDataset):
    """In each worker what a StatefulDataLoader does there: load its state, take it after items."""

    def __init__(self, inner, states):
        self.inner, self.states = inner, states

    def __iter__(self):
        worker = get_worker_info().id
        if self.states:
            self.inner.load_state_dict(self.states[worker])
        for item in self.inner:
            yield worker, item["input_ids"][:, 0].tolist(), self.inner.state_dict()


def test_workers_go_on_from_their_own_states(local):
    def run(states):
        dataset = _WithStates(local.to_torch(batch_size=2), states)
        found = {0: [], 1: []}
        for worker, rows, state in DataLoader(dataset, batch_size=None, num_workers=2):
            found[worker].append((rows, state))
        return found

    straight = run(None)
    assert sorted(row for came in straight.values() for rows, _ in came for row in rows) == [
        10 * i for i in range(NUM_ROWS)
    ]
    rest = run({0: straight[0][1][1], 1: straight[1][3][1]})
    for worker, done in ((0, 2), (1, 4)):
        assert [rows for rows, _ in rest[worker]] == [rows for rows, _ in straight[worker][done:]]


def test_refusals(store, local):
    with pytest.raises(ValueError, match="rank 2 is not below world_size 2"):
        local.to_torch(rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size 0 is below 1"):
        local.to_torch(batch_size=0)
    selection = open_selection(put_selection(store))
    selection.manifest.settings["grain"] = "documents"
    with pytest.raises(ArtifactError, match=r"keeps documents .* read them with `to_datasets"):
        selection.to_torch()
