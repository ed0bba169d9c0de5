"""The order of samples: properties for any data set, its memory, and mixtures of data sets."""

import hashlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import step_samples

from stillhouse.errors import InputError, SpecError
from stillhouse.training.mixture import Mixture
from stillhouse.training.order import (
    NO_SAMPLES,
    Rows,
    SampleOrder,
    Span,
    chain,
    check_workers,
    default_lanes,
    default_window,
)


def order_of(part_rows, *, global_batch=8, lanes=4, window=5, seed=1, weights=None):
    datasets = [Rows(rows, w) for rows, w in zip(part_rows, weights or [1.0], strict=True)]
    return SampleOrder(datasets, global_batch=global_batch, seed=seed, lanes=lanes, window=window)


PARTS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda rows: sum(rows) >= 8)


def test_the_order_never_changes():
    order = order_of([[3, 4, 2]], global_batch=3, lanes=3, window=2)
    assert [step_samples(order, step) for step in range(4)] == [
        [(2, 1), (0, 2), (1, 1)],
        [(2, 0), (0, 1), (1, 2)],
        [(0, 0), (1, 0), (1, 3)],
        [(1, 1), (2, 0), (0, 1)],
    ]


@settings(max_examples=40, deadline=None)
@given(PARTS, st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.integers(0, 3))
def test_every_row_once_an_epoch(part_rows, lanes, window, seed):
    order = order_of([part_rows], lanes=lanes, window=window, seed=seed)
    everything = {(part, row) for part, rows in enumerate(part_rows) for row in range(rows)}
    for epoch in range(2):
        seen = []
        for lane in range(lanes):
            size = order.lane_rows(0, lane)
            for position in range(epoch * size, (epoch + 1) * size):
                held = order.window_at(0, lane, position)
                assert held.epoch == epoch and held.start <= position < held.end
                row = held.permutation()[position - held.start]
                seen.append(tuple(held.samples()[row].tolist()))
        assert len(seen) == len(everything) and set(seen) == everything
    steps = sum(part_rows) // order.global_batch  # whole steps of the first epoch
    given = [sample for step in range(steps) for sample in step_samples(order, step)]
    assert len(set(given)) == len(given)


@settings(max_examples=40, deadline=None)
@given(PARTS, st.integers(1, 9), st.integers(0, 20), st.sampled_from([1, 2, 3, 4]))
def test_any_number_of_workers_gives_the_same_global_order(part_rows, window, step, num_workers):
    order = order_of([part_rows], window=window)
    shares = [step_samples(order, step, rank, num_workers) for rank in range(num_workers)]
    assert list(itertools.chain(*shares)) == step_samples(order, step)
    assert len(step_samples(order, step)) == order.global_batch


@settings(max_examples=20, deadline=None)
@given(
    st.lists(PARTS, min_size=1, max_size=3),
    st.lists(st.floats(0.05, 10), min_size=3, max_size=3),
    st.integers(0, 300),
    st.sampled_from([range(4), range(2, 4)]),
)
def test_windows_come_in_the_order_of_need_and_miss_nothing(sets, weights, step, lanes):
    order = order_of(sets, weights=weights[: len(sets)])
    wanted = {}  # the step that needs a window first
    for lane in lanes:
        datasets, positions = order.mixture.draws(lane, step * 2, 24)
        for i, (dataset, position) in enumerate(zip(datasets, positions, strict=True)):
            start = order.window_at(int(dataset), lane, int(position)).start
            wanted.setdefault((int(dataset), lane, start), step + i // 2)
    given = []
    for window in order.windows(lanes, step):
        given.append((window.dataset, window.lane, window.start))
        if len(set(given) & set(wanted)) == len(wanted):
            break
    assert len(set(given)) == len(given)
    later = step + 12  # whatever else came is needed after the steps looked at
    needs = [wanted.get(key, later) for key in given]
    assert needs == sorted(needs)


def test_seed_and_epoch_change_the_order():
    base = [step_samples(order_of([[50]]), step) for step in range(12)]
    assert base[:6] != base[6:]
    assert base[:6] != [step_samples(order_of([[50]], seed=2), step) for step in range(6)]


def lane_samples(order, lane, first, count):
    """Samples of a stretch of a lane, int64 [count, 2]."""
    found, position = [], first
    while position < first + count:
        window = order.window_at(0, lane, position)
        stop = min(window.end, first + count)
        rows = window.permutation()[position - window.start : stop - window.start]
        found.append(window.samples()[rows])
        position = stop
    return np.concatenate(found)


def effective_number(sources):
    shares = np.bincount(sources) / len(sources)
    shares = shares[shares > 0]
    return math.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(("num_files", "most_rows"), [(12, 900), (60, 900), (200, 4000)])
@pytest.mark.parametrize("global_batch", [16, 32, 128])
def test_files_of_one_source_each_are_mixed_like_a_true_shuffle(num_files, most_rows, global_batch):
    rng = np.random.default_rng(0)
    part_rows = rng.integers(most_rows // 3, most_rows, num_files).tolist()
    lanes = default_lanes(global_batch, sum(part_rows))
    window = default_window(lanes, 256)
    order = order_of([part_rows], global_batch=global_batch, lanes=lanes, window=window)
    width = global_batch // lanes
    pool = np.repeat(np.arange(num_files), part_rows)
    steps = min(100, len(pool) // global_batch)
    true = effective_number(rng.permutation(pool)[: steps * global_batch])
    for start in (0, max(0, len(pool) // global_batch - 150), len(pool) // global_batch):
        samples = [lane_samples(order, v, start * width, steps * width) for v in range(lanes)]
        found = effective_number(np.concatenate(samples)[:, 0])
        assert found >= 0.9 * true, f"{found:.1f} of {true:.1f} from step {start}"


def peak_bytes(part_rows):
    """Of making an order, seeking far into it and taking windows and steps there."""
    tracemalloc.start()
    order = order_of([part_rows], global_batch=64, lanes=64, window=512)
    before = 0.6 * sum(part_rows) // 64
    for step in (0, int(before), int(5 * before)):
        windows = order.windows(range(64), step)
        held = [next(windows) for _ in range(70)]
        assert all(window.num_rows for window in held)
        lane_samples(order, 63, step, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_rows():
    small, large = peak_bytes([1000] * 1000), peak_bytes([1_000_000] * 1000)
    assert large < 1.3 * small < 10_000_000


def test_lanes_and_first_windows():
    """Lanes differ by a row at most; first windows differ, so that lanes fetch in turn."""
    order = order_of([[7, 8, 7]])
    assert [order.lane_rows(0, lane) for lane in range(4)] == [5, 6, 5, 6]
    assert order.window_at(0, 0, 0).spans == (Span(2, 0, 5),)
    order = order_of([[100] * 4], lanes=4, window=40)
    assert [order.window_at(0, lane, 0).num_rows for lane in range(4)] == [40, 35, 30, 25]
    assert [order.window_at(0, lane, 99).num_rows for lane in range(4)] == [20, 25, 30, 35]


def test_the_chain():
    samples = np.array([[0, 5], [3, 1]])
    packed = b"".join(int(n).to_bytes(8, "little") for n in (0, 5, 3, 1))
    first = hashlib.sha256(bytes(32) + packed).digest()
    assert chain(NO_SAMPLES, samples) == first
    assert chain(first, samples) == hashlib.sha256(first + packed).digest()


def test_description_tells_orders_apart():
    base = order_of([[20, 30]]).describe()
    assert base == order_of([[20, 30]]).describe()
    others = [
        order_of([[20, 30]], seed=2),
        order_of([[20, 30]], lanes=2),
        order_of([[20, 30]], window=6),
        order_of([[20, 30]], global_batch=4),
        order_of([[30, 20]]),
        order_of([[20], [30]], weights=[1, 1]),
        order_of([[20], [30]], weights=[1, 2]),
    ]
    descriptions = [base, *(order.describe() for order in others)]
    assert all(descriptions.count(found) == 1 for found in descriptions)


def test_defaults():
    found = [default_lanes(batch, 10**6) for batch in (1, 32, 96, 100, 512, 67)]
    assert found == [1, 32, 48, 50, 64, 1]
    assert default_lanes(32, 20) == 16
    assert default_window(64, 256) == 16384
    assert default_window(64, 2048, 2) == 1024


def test_what_is_refused():
    with pytest.raises(SpecError, match="`lanes` 3 does not divide `global_batch` 8"):
        order_of([[20]], lanes=3)
    with pytest.raises(InputError, match="data set 1 has 3 sequences, fewer than the 4 lanes"):
        order_of([[20], [2, 1]], weights=[1, 1])
    with pytest.raises(SpecError, match=r"`compute.trainers` 3 .* use one of \[1, 2, 4\]"):
        check_workers(order_of([[20]]), 3)
    check_workers(order_of([[20]]), 2)
    for weights in ([1, -1], [0, 0]):
        with pytest.raises(SpecError, match="weights of data sets must be positive, not"):
            Mixture(weights, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(1, 3000))
def test_shares_of_a_mixture_hold_at_any_time(weights, draws):
    mixture = Mixture(weights, seed=1)
    datasets, positions = mixture.draws(2, 0, draws)
    done = draws - draws % 256
    for i, weight in enumerate(weights):
        mine = np.flatnonzero(datasets == i)
        assert mixture.num_drawn(i, 2, draws) == len(mine)
        assert positions[mine].tolist() == list(range(len(mine)))
        assert [mixture.draw_of(i, 2, n) for n in range(len(mine))[::50]] == mine[::50].tolist()
        assert abs((mine < done).sum() - done * weight / sum(weights)) < 2
    for first in {0, draws // 2, max(0, draws - 300)}:
        part, places = mixture.draws(2, first, draws - first)
        assert part.tolist() == datasets[first:].tolist()
        assert places.tolist() == positions[first:].tolist()


def test_a_small_weight_beside_two_large_ones_never_loses_a_draw():
    mixture = Mixture([4.0, 0.01171875, 9.75], seed=1)
    datasets, _ = mixture.draws(0, 0, 256 * 400)
    counts = np.bincount(datasets, minlength=3)
    assert counts.sum() == 256 * 400
    exact = 256 * 400 * np.array([4.0, 0.01171875, 9.75]) / 13.76171875
    assert np.abs(counts - exact).max() <= 1


def test_draws_differ_by_lane_and_seed_and_one_data_set_is_drawn_in_order():
    first = Mixture([1, 1], 0).draws(0, 0, 60)[0].tolist()
    assert first != Mixture([1, 1], 0).draws(1, 0, 60)[0].tolist()
    assert first != Mixture([1, 1], 1).draws(0, 0, 60)[0].tolist()
    mixture = Mixture([3.0], seed=0)
    assert [part.tolist() for part in mixture.draws(0, 7, 3)] == [[0, 0, 0], [7, 8, 9]]
    assert mixture.num_drawn(0, 0, 9) == mixture.draw_of(0, 0, 9) == 9
