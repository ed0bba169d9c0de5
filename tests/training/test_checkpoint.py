"""Checkpoints: complete or absent, the last and the best kept; `fit` resumes to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_parts import make_trainer, same, write_parts

from stillhouse.errors import ArtifactError, StorageError
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints, Snapshot, fit
from stillhouse.training.group import WorkerGroup

NAME, LAST = "a" * 64, 12


def snapshot(step):
    tensors = {
        "model.embed": torch.full((4, 3), float(step)),
        "model.norm": torch.arange(3.0),
        "optimizer.exp_avg.embed": torch.full((4, 3), -float(step)),
        "optimizer.step.embed": torch.tensor(float(step)),
    }
    return Snapshot(tensors, {"step": step, "source": {"consumed": 8 * step}})


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def save(store, *steps, **scores):
    with Checkpoints(store, NAME) as writer:
        for step in steps:
            writer.save(snapshot(step), scores.get(f"s{step}"))


def newest_is(store, step):
    return same(Checkpoints(store, NAME).load_newest(), snapshot(step))


def folder(store, step):
    return Path(store.path("checkpoints", NAME, f"{step:08d}"))


def test_what_was_saved_is_loaded(store, monkeypatch):
    assert Checkpoints(store, NAME).load_newest() is None
    save(store, 10)
    names = sorted(path.name.split("-")[0] for path in folder(store, 10).iterdir())
    assert names == ["manifest.json", "model", "optimizer", "progress"]
    monkeypatch.setattr("stillhouse.training.checkpoint._SHARD_BYTES", 50)
    save(store, 20)
    assert len(list(folder(store, 20).glob("model-*"))) == 2
    assert newest_is(store, 20)
    assert same(Checkpoints(store, NAME).load(10), snapshot(10))
    with pytest.raises(ArtifactError, match=r"no checkpoint at .*00000030"):
        Checkpoints(store, NAME).load(30)


def test_the_last_and_the_best_are_kept(store):
    save(store, 10, 20, 30, 40, 50, s10=3.0, s20=2.5, s30=2.9, s40=2.5, s50=2.8)
    assert Checkpoints(store, NAME).steps() == [40, 50]  # of equally good ones, the later
    save(store, 60, 70, s60=2.6, s70=2.7)
    names = sorted(path.name for path in folder(store, 0).parent.iterdir())
    assert names == ["00000040", "00000060", "00000070"]
    assert newest_is(store, 70)


@pytest.mark.parametrize("damage", ["no manifest", "cut", "gone", "manifest"])
def test_a_broken_one_is_skipped_and_written_again(store, damage):
    save(store, 10, 20)
    file = next(folder(store, 20).glob("optimizer-*"))
    manifest = folder(store, 20) / "manifest.json"
    if damage in ("gone", "no manifest"):
        (file if damage == "gone" else manifest).unlink()
    else:
        broken = file if damage == "cut" else manifest
        broken.write_bytes(broken.read_bytes()[:40])
    assert newest_is(store, 10)
    assert Checkpoints(store, NAME).steps() == [10]
    save(store, 20)
    assert newest_is(store, 20)


def test_a_failed_write_is_raised_once_and_the_others_stay(store):
    save(store, 10)
    writer = Checkpoints(store, NAME)
    folder(store, 20).write_bytes(b"in the way")
    writer.save(snapshot(20))
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        writer.wait()
    writer.wait()
    folder(store, 20).unlink()
    assert newest_is(store, 10)


DYING = """
import os, sys
import stillhouse.training.checkpoint as module
from test_checkpoint import save, Store
write, left = module.create, int(sys.argv[2])
def create(uri, data):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return write(uri, data)
module.create = create
save(Store(sys.argv[1]), 20)
"""


def test_a_process_that_dies_while_writing_leaves_the_others_valid(store):
    save(store, 10)
    run = [sys.executable, "-c", DYING, store.uri, "1"]
    here = Path(__file__).parent
    path = os.pathsep.join([os.getcwd(), str(here), str(here.parent)])
    assert subprocess.run(run, env=os.environ | {"PYTHONPATH": path}).returncode == 9
    assert len(list(folder(store, 20).iterdir())) == 1  # and no manifest
    assert newest_is(store, 10)
    save(store, 20)
    assert newest_is(store, 20)


class StoppedError(Exception):
    pass


@pytest.fixture
def start(tmp_path):
    """Train up to step 12 with checkpoints in a store; optionally stop after `stop` steps."""
    uris = write_parts(tmp_path)

    def run(store, stop=None):
        losses = {}

        def on_step(record):
            losses[record.step] = record.loss
            if record.step == stop:
                raise StoppedError
            return record.loss if record.step % 2 == 0 else None

        trainer = make_trainer(uris)
        checkpoints = Checkpoints(Store(f"{tmp_path}/{store}"), NAME)
        options = {"num_steps": LAST, "checkpoint_every": 3, "on_step": on_step}
        try:
            first = fit(trainer, checkpoints, WorkerGroup(), **options)
        except StoppedError:
            first = None
        return first, losses, trainer, checkpoints.steps()

    return run


def test_a_resumed_training_has_the_same_bits(start):
    first, whole, trainer, steps = start("whole")
    assert (first, [*whole], steps) == (0, [*range(1, LAST + 1)], [9, 12])
    _, head, _, steps = start("stopped", stop=8)
    assert steps == [3, 6]
    first, rest, resumed, steps = start("stopped")
    assert (first, [*rest], steps) == (6, [*range(7, LAST + 1)], [9, 12])
    assert head == {step: whole[step] for step in head}
    assert rest == {step: whole[step] for step in rest}
    assert resumed.order_sha256 == trainer.order_sha256
    assert same(resumed.snapshot(), trainer.snapshot())
    first, losses, _, _ = start("whole")
    assert (first, losses) == (LAST, {})  # finished: nothing to do
