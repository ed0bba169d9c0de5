"""Readers and scorers of the windows of a training's data, beside or ahead of the training."""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from stillhouse.errors import StillhouseError
from stillhouse.storage.artifact import Store
from stillhouse.training.fetch import PartReader
from stillhouse.training.signals import with_signals
from stillhouse.training.task import TrainTask

if TYPE_CHECKING:  # torch, which readers do not need
    from stillhouse.training.online import ScoredWindow, WindowScorer


class WindowReader:
    """Reads windows inside Ray Data, beside a training worker.

    An error of a part is returned as a row, since Ray Data would wrap the exception.
    """

    def __init__(self, reader: PartReader) -> None:
        self._reader = reader

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """The table of the window in column `window`, or `error` and `message`."""
        try:
            return self._reader.read(batch["window"][0])
        except StillhouseError as error:
            return pa.table({"error": [type(error).__name__], "message": [str(error)]})


class WindowTeacher(WindowReader):
    """Reads windows and adds what teachers say of their tokens."""

    def __init__(self, reader: PartReader, task: TrainTask, store: Store) -> None:
        super().__init__(reader)
        self._settings = task.settings.objective.signal_settings
        self._teachers = [host.build(store) for host in task.teachers]

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """As `WindowReader`, with the columns of `stillhouse.training.signals`."""
        table = super().__call__(batch)
        if "error" in table.column_names:
            return table
        return with_signals(table, self._teachers, self._settings)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class OnlineScorer:
    """Scores its lanes' share of each window once, for all training workers.

    Args:
        rank, num_scorers: determine its lanes.
        kept: windows to keep for workers that have not asked for them yet.
    """

    def __init__(self, task: TrainTask, rank: int, num_scorers: int, kept: int) -> None:
        self._task, self._rank, self._num_scorers, self._kept = task, rank, num_scorers, kept
        self._scorer: WindowScorer | None = None
        self._windows: OrderedDict[int, ScoredWindow] = OrderedDict()

    def window(self, number: int) -> "ScoredWindow":
        """Its candidates of a window.

        Raises:
            StillhouseError: a part or model that cannot be read.
        """
        if self._scorer is None:  # not in __init__, so that the caller gets its errors
            from stillhouse.training.online import online_scorer

            self._scorer = online_scorer(self._task, self._rank, self._num_scorers)
        if number not in self._windows:
            self._windows[number] = self._scorer.window(number)
            while len(self._windows) > self._kept:
                self._windows.popitem(last=False)
        return self._windows[number]
