"""The Scorer ahead of a trainer: scores the windows that it is asked for, one after the other."""

from collections import OrderedDict

import ray

from stillhouse.training.online import ScoredWindow, WindowScorer, online_scorer
from stillhouse.training.task import TrainTask


@ray.remote(max_restarts=-1, max_task_retries=-1)
class OnlineScorer:
    """Scores its lanes' share of each window once, whoever of the training workers asks first.

    Args:
        task: what to choose from.
        rank, num_scorers: which lanes are its own.
        kept: windows that another worker may still ask for.
    """

    def __init__(self, task: TrainTask, rank: int, num_scorers: int, kept: int) -> None:
        self._make = lambda: online_scorer(task, rank, num_scorers)
        self._scorer: WindowScorer | None = None
        self._windows: OrderedDict[int, ScoredWindow] = OrderedDict()
        self._kept = kept

    def window(self, number: int) -> ScoredWindow:
        """Its candidates of a window.

        Raises:
            StillhouseError: a part or model that cannot be read.
        """
        if self._scorer is None:  # not in __init__: its errors should be the asker's
            self._scorer = self._make()
        if number not in self._windows:
            self._windows[number] = self._scorer.window(number)
            while len(self._windows) > self._kept:
                self._windows.popitem(last=False)
        return self._windows[number]
