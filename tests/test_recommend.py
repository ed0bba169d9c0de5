"""The recommender on made grids, whose best settings are known."""

from itertools import product

import pytest

from stillhouse.errors import SpecError
from stillhouse.recommend import LeftOut, Recommender, TaskGrid, leave_one_out

GRID = [
    {"loss": loss, "layers": layers, "alpha": alpha}
    for loss, layers, alpha in product(("mse", "cos", "mi"), ("skip", "last"), (0.1, 0.5, 0.9))
]
COST = {"mse": 0.0, "cos": 0.2, "mi": -0.3, "skip": 0.1, "last": 0.0}


def metric_of(setting):
    return COST[setting["loss"]] + COST[setting["layers"]] + abs(setting["alpha"] - 0.5)


def grid(name, scale=1.0, shift=0.0, sign=1, **features):
    metrics = [shift + scale * sign * metric_of(one) for one in GRID]
    return TaskGrid(name, GRID, metrics, features)


def test_tasks_that_agree_are_recommended_their_best():
    """Best: mi, last, .5, of -.3; mean: -.1 / 3 + .05 + .8 / 3 = .28333. Scale and shift of a task
    do not matter."""
    tasks = [grid("a"), grid("b", scale=10), grid("c", shift=5), grid("d", scale=0.1, shift=-2)]
    found = leave_one_out(tasks, smallest=True)
    best = {"loss": "mi", "layers": "last", "alpha": 0.5}
    assert [one.setting for one in found] == [best] * 4
    assert [one.regret for one in found] == pytest.approx([0] * 4)
    gain = 0.3 - 0.1 / 3 + 0.05 + 0.8 / 3
    assert [one.gain for one in found] == pytest.approx([gain, 10 * gain, gain, 0.1 * gain])
    assert found[2].best == pytest.approx(4.7) and found[2].mean == pytest.approx(4.7 + gain)


def test_a_task_unlike_the_others_is_regretted():
    """The best of the others is the worst of the task whose metric is the negative: .3 against
    -.7 (cos, skip, .1 or .9)."""
    tasks = [grid("a"), grid("b"), grid("c"), grid("odd", sign=-1)]
    odd = leave_one_out(tasks, smallest=True)[-1]
    assert odd.setting == {"loss": "mi", "layers": "last", "alpha": 0.5}
    assert (odd.metric, odd.best) == (pytest.approx(0.3), pytest.approx(-0.7))
    assert odd.regret == pytest.approx(1.0) and odd.gain < 0


def test_features_tell_kinds_of_tasks_apart():
    """Tasks with many examples are the negatives of those with few."""
    tasks = [grid(f"few{i}", num_examples=100.0 + i) for i in range(3)]
    tasks += [grid(f"many{i}", sign=-1, num_examples=1e5 + i) for i in range(3)]
    found = leave_one_out(tasks, smallest=True)
    assert [one.regret for one in found] == pytest.approx([0] * 6)
    chosen = Recommender(tasks, smallest=True).best(GRID, {"num_examples": 2e5})
    assert (GRID[chosen]["loss"], GRID[chosen]["layers"]) == ("cos", "skip")


def test_the_largest_may_be_the_best():
    tasks = [grid("a"), grid("b"), grid("c", scale=2)]
    found = leave_one_out(tasks, smallest=False)
    assert all(isinstance(one, LeftOut) and one.setting["loss"] == "cos" for one in found)
    assert [one.regret for one in found] == pytest.approx([0] * 3)
    assert found[0].metric == pytest.approx(0.7) and found[0].gain > 0


def test_bad_tasks():
    with pytest.raises(SpecError, match=r"2 tasks: leaving one out needs at least 3"):
        leave_one_out([grid("a"), grid("b")], smallest=True)
    other = TaskGrid("c", [{"tau": 4}, {"tau": 8}], [1.0, 2.0])
    with pytest.raises(SpecError, match=r"c is a sweep over \['tau'\], a over \['alpha', 'la"):
        leave_one_out([grid("a"), grid("b"), other], smallest=True)
    with pytest.raises(SpecError, match=r"b has the features \['size'\], a has \[\]"):
        leave_one_out([grid("a"), grid("b", size=1.0), grid("c")], smallest=True)
    with pytest.raises(SpecError, match=r"^1 task: leaving one out"):
        leave_one_out([grid("a")], smallest=True)
    short = TaskGrid("c", GRID[:1], [1.0])
    with pytest.raises(SpecError, match=r"c has 1 result: a grid has at least 2"):
        leave_one_out([grid("a"), grid("b"), short], smallest=True)
