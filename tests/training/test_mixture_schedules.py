"""Weights that change: counts against a simulation draw by draw, positions, windows, limits."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import step_samples

from stillhouse.training.mixture import Mixture, ScheduledMixture
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.schedule import Schedule, plan_draws

WIDTH = 2
ANNEAL = Schedule(((0.0, 3.0), (0.8, 0.0)))
RAMP = Schedule(((0.0, 0.0), (0.5, 4.0), (1.0, 1.0)), linear=True)
WEIGHTS = st.one_of(st.just(0.0), st.floats(0.01, 10))


@st.composite
def schedules(draw):
    inner = draw(st.lists(st.integers(1, 99), max_size=3, unique=True))
    at = [0.0, *(n / 100 for n in sorted(inner))]
    weights = draw(st.lists(WEIGHTS, min_size=len(at), max_size=len(at)))
    return Schedule(tuple(zip(at, weights, strict=True)), draw(st.booleans()))


MIXTURES = st.tuples(st.floats(0.05, 10), st.lists(schedules(), min_size=1, max_size=3)).map(
    lambda found: [found[0], *found[1]]
)


def weight_at(weight, fraction):
    """By the words of the documentation: a jump at each point, or straight lines between them."""
    if not isinstance(weight, Schedule):
        return weight
    points = [*weight.points, (math.inf, weight.points[-1][1])]
    for (start, low), (end, high) in itertools.pairwise(points):
        if start <= fraction < end:
            if not weight.linear or end == math.inf:
                return low
            return low + (high - low) * (fraction - start) / (end - start)
    raise AssertionError


def integral(weights, draws):
    """[draws + 1, K]: what the weights ask for up to each draw, added up draw by draw."""
    sums = [[0.0] * len(weights)]
    for draw in range(draws):
        now = [weight_at(weight, (draw + 0.5) / draws) for weight in weights]
        sums.append([a + w / sum(now) for a, w in zip(sums[-1], now, strict=True)])
    return np.array(sums)


def mixture_of(weights, num_steps, limits=None, seed=1):
    limits = limits or [None] * len(weights)
    plan = plan_draws(weights, limits, num_steps=num_steps, rows_per_lane=WIDTH)
    return ScheduledMixture(plan, seed)


@settings(max_examples=60, deadline=None)
@given(MIXTURES, st.integers(1, 15).map(lambda n: 100 * n))
def test_counts_follow_the_weights(weights, num_steps):
    draws = num_steps * WIDTH  # points fall on whole steps
    mixture, wanted = mixture_of(weights, num_steps), integral(weights, draws)
    plan = mixture.plan
    assert plan.starts[0] == 0 and plan.starts[-1] == draws
    assert plan.counts.sum(axis=1).tolist() == plan.starts.tolist()
    assert (np.diff(plan.counts, axis=0) >= 0).all()
    ramps = any(isinstance(one, Schedule) and one.linear for one in weights)
    most = 8 if ramps else 1.5  # ramps go in steps of 16 draws, each with its middle's shares
    assert np.abs(plan.counts - wanted[plan.starts]).max() < most
    assert mixture.asked == pytest.approx((wanted[-1] / draws).tolist(), abs=0.02)
    datasets, _ = mixture.draws(3, 0, draws)
    for i, weight in enumerate(weights):
        never = [not weight_at(weight, (draw + 0.5) / draws) for draw in range(draws)]
        assert not (datasets[never] == i).any()


@settings(max_examples=30, deadline=None)
@given(
    MIXTURES,
    st.lists(st.one_of(st.none(), st.integers(0, 400)), min_size=3, max_size=3),
    st.integers(1, 600),
)
def test_positions_count_up_and_are_found_again(weights, limits, num_steps):
    limits = [None, *limits[: len(weights) - 1]]
    mixture, draws = mixture_of(weights, num_steps, limits), num_steps * WIDTH
    datasets, positions = mixture.draws(2, 0, draws)
    for i, limit in enumerate(limits):
        mine = np.flatnonzero(datasets == i)
        assert positions[mine].tolist() == list(range(len(mine)))
        assert limit is None or len(mine) <= limit
        for n in range(0, len(mine), 17):
            assert mixture.draw_of(i, 2, n) == mine[n]
        assert mixture.draw_of(i, 2, len(mine)) is None
        for before in {0, draws // 3, draws - 1, draws}:
            assert mixture.num_drawn(i, 2, before) == (mine < before).sum()
    for first in {0, draws // 2, max(0, draws - 30)}:
        part, places = mixture.draws(2, first, draws - first)
        assert part.tolist() == datasets[first:].tolist()
        assert places.tolist() == positions[first:].tolist()


def order_of(sets, weights, num_steps, max_epochs=(None, None, None), **changes):
    rows = [Rows(s, w, m) for s, w, m in zip(sets, weights, max_epochs, strict=False)]
    asked = {"global_batch": 8, "seed": 1, "lanes": 4, "window": 5} | changes
    return SampleOrder(rows, num_steps=num_steps, **asked)


SETS = [[9, 30], [25], [13, 4]]


@settings(max_examples=30, deadline=None)
@given(MIXTURES, st.integers(1, 80), st.integers(0, 79), st.sampled_from([1, 2, 4]))
def test_steps_and_windows_agree_for_any_number_of_workers(weights, num_steps, step, workers):
    step = min(step, num_steps - 1)
    sets = [[9, 30], [25], [13, 4], [20]][: len(weights)]
    order = order_of(sets, weights, num_steps, (None, 3, 2, None))
    shares = [step_samples(order, step, rank, workers) for rank in range(workers)]
    assert list(itertools.chain(*shares)) == step_samples(order, step)
    needed = {}
    for lane in range(4):
        datasets, positions = order.mixture.draws(lane, step * 2, (num_steps - step) * 2)
        for i, (dataset, position) in enumerate(zip(datasets, positions, strict=True)):
            start = order.window_at(int(dataset), lane, int(position)).start
            needed.setdefault((int(dataset), lane, start), step + i // 2)
    given = [(w.dataset, w.lane, w.start) for w in order.windows(range(4), step, num_steps)]
    assert len(given) == len(set(given)) and set(given) == set(needed)
    assert [needed[key] for key in given] == sorted(needed.values())


def test_every_row_once_an_epoch():
    """Two epochs of a set of 52 rows on 4 lanes, while its weight moves."""
    order = order_of([[9, 43], [40]], [RAMP, 1.0], 400)
    seen = []
    for step in range(400):
        seen += [sample for sample in step_samples(order, step) if sample[0] < 2]
    everything = {(0, row) for row in range(9)} | {(1, row) for row in range(43)}
    lanes = [order.mixture.num_drawn(0, lane, 800) for lane in range(4)]
    assert len(set(lanes)) == 1 and lanes[0] > 26
    counts = [seen.count(sample) for sample in everything]
    assert set(seen) == everything and max(counts) - min(counts) <= 1


def test_a_limit_is_never_passed_and_the_others_share_the_rest():
    order = order_of([[90, 30], [26], [200]], [1.0, 2.0, 1.0], 60, (None, 1.5, None))
    taken = [order.num_drawn(i, 60) for i in range(3)]
    # a lane of set 1 has 6 or 7 rows: one and a half times the smaller ones; the rest evenly
    assert taken[1] == [9] * 4
    assert sum(taken[0]) + sum(taken[2]) == 480 - 36
    assert abs(sum(taken[0]) - sum(taken[2])) <= 4
    samples = [sample for step in range(60) for sample in step_samples(order, step)]
    assert max(samples.count((2, row)) for row in range(26)) == 2
    order = order_of([[90, 30], [40]], [1.0, 1.0], 60, (None, 1))
    samples = [sample for step in range(60) for sample in step_samples(order, step)]
    assert sorted(s for s in samples if s[0] == 2) == [(2, row) for row in range(40)]


def test_a_plan_ends_where_all_data_are_exhausted():
    plan = plan_draws([1.0, 1.0], [10, 20], num_steps=20, rows_per_lane=2)
    assert (plan.starts.tolist(), plan.counts[-1].tolist()) == ([0, 20, 30], [10, 20])
    assert plan.asked == [0.5, 0.5]
    anneal = [Schedule(((0.0, 0.0), (0.5, 1.0))), Schedule(((0.0, 1.0), (0.5, 0.0)))]
    plan = plan_draws(anneal, [None, 3], num_steps=10, rows_per_lane=1)
    assert plan.starts[-1] == 3  # though there would be data again from step 5


def test_limits_that_are_not_reached_change_nothing():
    plain = order_of(SETS, [1.0, 2.0, 3.0], None)
    limited = order_of(SETS, [1.0, 2.0, 3.0], 40, (100, 100, 100))
    assert isinstance(limited.mixture, Mixture)
    assert limited.describe() == plain.describe()
    assert [step_samples(limited, s) for s in range(40)] == [
        step_samples(plain, s) for s in range(40)
    ]


def test_descriptions_tell_schedules_apart():
    base = order_of(SETS, [ANNEAL, 1.0, 1.0], 40).describe()
    assert base == order_of(SETS, [ANNEAL, 1.0, 1.0], 40).describe()
    others = [
        order_of(SETS, [ANNEAL, 1.0, 1.0], 41),
        order_of(SETS, [Schedule(ANNEAL.points, linear=True), 1.0, 1.0], 40),
        order_of(SETS, [1.0, ANNEAL, 1.0], 40),
        order_of(SETS, [3.0, 1.0, 1.0], 40),
        order_of(SETS, [ANNEAL, 1.0, 1.0], 40, (None, 2, None)),
    ]
    descriptions = [base, *(order.describe() for order in others)]
    assert all(descriptions.count(found) == 1 for found in descriptions)


def test_stretches_of_few_draws_are_shuffled_on_their_own():
    mixture = mixture_of([Schedule(((0.0, 1.0), (1.0, 1.1)), linear=True), 1.0], 400)
    lines = mixture.draws(0, 0, 800)[0].reshape(-1, 16)
    assert len({tuple(line) for line in lines.tolist()}) > 40
    assert mixture.draws(1, 0, 800)[0].tolist() != lines.reshape(-1).tolist()


def test_a_long_training_has_few_stretches():
    """Five million steps of 1,024 sequences on 64 lanes: 80 million draws a lane."""
    plan = plan_draws([RAMP, 1.0, 2.0], [None] * 3, num_steps=5_000_000, rows_per_lane=16)
    assert len(plan.starts) <= 4200
    mixture = ScheduledMixture(plan, 0)
    draw = mixture.draw_of(0, 5, 10_000_000)
    datasets, positions = mixture.draws(5, draw, 1)
    assert (datasets[0], positions[0]) == (0, 10_000_000)


def test_the_order_of_a_schedule_never_changes():
    mixture = mixture_of([ANNEAL, 1.0], 10)
    assert mixture.plan.starts.tolist() == [0, 16, 20]
    assert "".join(map(str, mixture.draws(0, 0, 20)[0])) == "10000001010000101111"
