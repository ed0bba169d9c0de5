"""Which settings to take for a new task, from the same grid on other tasks.

As AutoDistiller of Distiller (He et al. 2021, arXiv 2109.11105): a regression predicts how good a
setting is from the setting and the task, and the best prediction is recommended. Here the
regression is gradient-boosted trees, and what is predicted is the metric in standard deviations
from the task's mean over the grid, so that hard and easy tasks count alike.

How much a recommendation is worth is measured by leaving one task out: the regression sees the
others, and the setting that it recommends is compared with the best one of the left-out task, and
with the mean over the grid, which a random choice has on average.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SpecError
from stillhouse.report.formatting import number_of

Setting: TypeAlias = Mapping[str, float | int | str | bool | None]


@dataclass(frozen=True, slots=True)
class TaskGrid:
    """A task's results: settings, the metric of each, and features of the task itself."""

    name: str
    settings: Sequence[Setting]
    metrics: Sequence[float]
    features: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is recommended for a task by the others.

    Attributes:
        setting: that is recommended.
        metric: its metric.
        best, mean: the best metric of the grid, and its mean.
        regret: how much worse than the best one the setting is, 0 or more.
        gain: how much better than the mean it is.
    """

    name: str
    setting: Setting
    metric: float
    best: float
    mean: float
    regret: float
    gain: float


class Recommender:
    """Predicts how good settings are on a task, by gradient-boosted trees.

    Args:
        tasks: at least two, with the same keys and features.
        smallest: whether the smallest metric is the best.
        seed: of the trees.

    Raises:
        SpecError: tasks with other keys or features, or too few results.
    """

    def __init__(self, tasks: Sequence[TaskGrid], *, smallest: bool, seed: int = 0) -> None:
        from sklearn.ensemble import GradientBoostingRegressor

        check_tasks(tasks)
        self._smallest = smallest
        self._columns = _columns(tasks)
        self._model = GradientBoostingRegressor(
            n_estimators=200, learning_rate=0.1, max_depth=3, random_state=seed
        )
        rows = [self._row(one, task.features) for task in tasks for one in task.settings]
        scores = [standardised(task.metrics) for task in tasks]
        self._model.fit(np.array(rows), np.concatenate(scores))

    def best(self, settings: Sequence[Setting], features: Mapping[str, float]) -> int:
        """The index of the setting with the best prediction, the first of equal ones."""
        predicted = self._model.predict(np.array([self._row(one, features) for one in settings]))
        return int(np.argmin(predicted) if self._smallest else np.argmax(predicted))

    def _row(self, setting: Setting, features: Mapping[str, float]) -> list[float]:
        """Numbers as they are; of other values, whether a setting has them."""
        row = [features[name] for name in sorted(features)]
        for key, kinds in self._columns.items():
            value = setting[key]
            row += [float(value == one) for one in kinds] if kinds else [float(value or 0)]
        return row


def leave_one_out(tasks: Sequence[TaskGrid], *, smallest: bool, seed: int = 0) -> list[LeftOut]:
    """What the others recommend for each task.

    Raises:
        SpecError: fewer than three tasks, or as `Recommender`.
    """
    if len(tasks) < 3:
        raise SpecError(f"{number_of(len(tasks), 'task')}: leaving one out needs at least 3")
    check_tasks(tasks)
    found: list[LeftOut] = []
    for i, task in enumerate(tasks):
        others = [*tasks[:i], *tasks[i + 1 :]]
        chosen = Recommender(others, smallest=smallest, seed=seed).best(
            task.settings, task.features
        )
        best = (min if smallest else max)(task.metrics)
        metric, mean, sign = task.metrics[chosen], fmean(task.metrics), 1 if smallest else -1
        regret, gain = sign * (metric - best), sign * (mean - metric)
        found.append(
            LeftOut(task.name, dict(task.settings[chosen]), metric, best, mean, regret, gain)
        )
    return found


def check_tasks(tasks: Sequence[TaskGrid]) -> None:
    """Check that tasks can be compared.

    Raises:
        SpecError: other keys or features than the first one's, or fewer than two results.
    """
    first = tasks[0]
    for task in tasks:
        if len(task.metrics) < 2:
            count = number_of(len(task.metrics), "result")
            raise SpecError(f"{task.name} has {count}: a grid has at least 2")
        if {*task.settings[0]} != {*first.settings[0]}:
            raise SpecError(
                f"{task.name} is a sweep over {sorted(task.settings[0])}, {first.name} over "
                f"{sorted(first.settings[0])}: give sweeps over the same keys"
            )
        if {*task.features} != {*first.features}:
            raise SpecError(
                f"{task.name} has the features {sorted(task.features)}, {first.name} has "
                f"{sorted(first.features)}: give the same ones for every task"
            )


def standardised(metrics: Sequence[float]) -> NDArray[np.float64]:
    """Standard deviations from the mean, [N]; zeros where all are equal."""
    values = np.asarray(metrics, np.float64)
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def _columns(tasks: Sequence[TaskGrid]) -> dict[str, list[object]]:
    """By key its values, if they are not all numbers; else none."""
    found: dict[str, list[object]] = {}
    for key in tasks[0].settings[0]:
        values = [one[key] for task in tasks for one in task.settings]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        found[key] = [] if numbers else [*dict.fromkeys(values)]
    return found
