"""Figures of a training are of all of it, whenever it was stopped."""

import pytest

from stillhouse.training.history import History
from stillhouse.training.loop import StepRecord


def record(step, seconds, mfu):
    return StepRecord(
        step=step,
        tokens=100 * step,
        loss=1.0,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens_per_s=100 / seconds,
        seconds=seconds,
        data_wait_s=seconds / 10,
        micro_batch=1,
        mfu=mfu,
    )


def test_time_waits_and_utilisation_are_those_of_the_whole_training():
    """A slow first step (it compiles) weighs as long as it took, over a resume too."""
    first, second = History(1000), History(1000)
    first.add(record(1, 8.0, 0.1))
    second.load_state_dict(first.state_dict())
    for step, seconds in ((2, 1.0), (3, 1.0)):
        second.add(record(step, seconds, 0.6))
    found = second.state_dict()
    assert (found["seconds"], found["data_wait_s"]) == pytest.approx((10.0, 1.0))
    assert found["mfu_s"] / found["seconds"] == pytest.approx(0.2)  # (8 x 0.1 + 2 x 0.6) / 10


def test_no_utilisation_where_no_peak_is_known():
    history = History(10)
    history.add(record(1, 1.0, None))
    assert history.state_dict()["mfu_s"] is None
