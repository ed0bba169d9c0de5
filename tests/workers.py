"""The training workers of this process's own Ray, and a listener that kills one."""

import os
import signal

import psutil
from small import Quiet

ALONE, OF_SEVERAL = "WorkerGroupActor", "RayTrainWorker"
"""What the process of a training's only worker is called, and that of one of several."""


class Killer(Quiet):
    """Kills a training worker once, at a step of the training; keeps how trainings began.

    Args:
        at: the step; None: never.
        kind: of the worker, `ALONE` or `OF_SEVERAL`.
    """

    def __init__(self, at=None, kind=OF_SEVERAL):
        super().__init__()
        self._at, self._kind = at, kind
        self.killed, self.starts = [], []

    def note(self, kind, content):
        if kind == "train start":
            self.starts.append(content)
        if kind == "train point" and self._at and content["step"] >= self._at and not self.killed:
            worker = training_workers(self._kind)[-1]
            self.killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)


def training_workers(kind=OF_SEVERAL):
    found = psutil.Process().children(recursive=True)
    return [p for p in found if kind in command_line(p)]


def command_line(process):
    """Empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
