"""A training that is stopped and started again is the training that was not."""

import pytest
from test_group import STEPS, make_trainer, write_parts
from test_loop import same

from stillhouse.errors import ArtifactError
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fit import fit
from stillhouse.training.group import WorkerGroup

LAST = 12


class StoppedError(Exception):
    pass


@pytest.fixture
def start(tmp_path):
    """Trains on parts in a folder up to step 12, keeping losses; stops after `stop` steps."""
    uris = write_parts(tmp_path)

    def run(store, stop=None, identity=None):
        losses = {}

        def on_step(record):
            losses[record.step] = record.loss
            if record.step == stop:
                raise StoppedError
            return record.loss if record.step % 2 == 0 else None

        trainer, group = make_trainer(uris), WorkerGroup()
        checkpoints = Checkpoints(Store(f"{tmp_path}/{store}"), "a" * 64, identity or {})
        options = {"num_steps": LAST, "checkpoint_every": 3, "on_step": on_step}
        try:
            first = fit(trainer, checkpoints, group, **options)
        except StoppedError:
            first = None
        return first, losses, trainer, checkpoints

    return run


def test_stopped_and_started_it_has_the_same_bits(start):
    first, whole, trainer, checkpoints = start("whole")
    assert first == 0 and list(whole) == list(range(1, LAST + 1)) and LAST < STEPS
    assert checkpoints.steps() == [9, 12]
    _, head, _, kept = start("stopped", stop=8)
    assert kept.steps() == [3, 6]
    first, rest, resumed, kept = start("stopped")
    assert first == 6 and list(rest) == list(range(7, LAST + 1))
    assert head | rest == whole and {step: head[step] for step in (7, 8)} == {
        step: rest[step] for step in (7, 8)
    }
    assert resumed.order_sha256 == trainer.order_sha256
    assert same(resumed.snapshot(), trainer.snapshot())
    assert kept.steps() == [9, 12]


def test_a_finished_one_has_nothing_to_do(start):
    start("whole")
    first, losses, _, _ = start("whole")
    assert first == LAST and losses == {}


def test_another_training_is_refused(start):
    start("whole", identity={"train": {"seed": 0}})
    with pytest.raises(ArtifactError, match=r"`train.seed` is 0 there and 1 here"):
        start("whole", identity={"train": {"seed": 1}})
