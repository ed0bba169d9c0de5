"""Checkpoints: whole or not there, the last and the best, and refused where they do not belong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillhouse.errors import ArtifactError, StorageError
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.state import Snapshot

IDENTITY = {"model": {"hidden_size": 32}, "train": {"learning_rate": 0.01, "seed": 0}}
NAME = "a" * 64


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


def checkpoints(store, identity=IDENTITY, keep_last=2):
    return Checkpoints(store, NAME, identity, keep_last=keep_last)


def save(store, *steps, **scores):
    with checkpoints(store) as writer:
        for step in steps:
            writer.save(snapshot(step), scores.get(f"s{step}"))


def same(loaded, step):
    expected = snapshot(step)
    assert loaded.step == step and loaded.snapshot.progress == expected.progress
    assert loaded.snapshot.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(loaded.snapshot.tensors[name], tensor)


def folder(store, step):
    return Path(store.path("checkpoints", NAME, f"{step:08d}"))


def test_nothing_there(store):
    assert checkpoints(store).load_newest() is None
    assert checkpoints(store).steps() == []


def test_what_was_saved_is_loaded(store):
    save(store, 10, 20)
    same(checkpoints(store).load(10), 10)
    with pytest.raises(ArtifactError, match=r"no checkpoint at .*00000030"):
        checkpoints(store).load(30)
    loaded = checkpoints(store).load_newest()
    same(loaded, 20)
    assert loaded.broken == ()
    names = sorted(path.name.split("-")[0] for path in folder(store, 10).iterdir())
    assert names == ["manifest.json", "model", "optimizer", "progress"]


def test_the_last_and_the_best_are_kept(store):
    save(store, 10, 20, 30, 40, 50, s10=3.0, s20=2.5, s30=2.9, s40=2.5, s50=2.8)
    assert checkpoints(store).steps() == [40, 50]  # of equally good ones, the later
    save(store, 60, 70, s60=2.6, s70=2.7)
    assert checkpoints(store).steps() == [40, 60, 70]
    names = sorted(path.name for path in folder(store, 0).parent.iterdir())
    assert names == ["00000040", "00000060", "00000070"]
    same(checkpoints(store).load_newest(), 70)


def test_a_checkpoint_is_there_whole_or_not_at_all(store):
    save(store, 10, 20)
    (folder(store, 20) / "manifest.json").unlink()  # its writer died before the last create
    same(checkpoints(store).load_newest(), 10)
    save(store, 20)  # made again
    same(checkpoints(store).load_newest(), 20)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_a_broken_one_is_passed_over_and_made_again(store, damage):
    save(store, 10, 20)
    file = next(folder(store, 20).glob("optimizer-*"))
    if damage == "gone":
        file.unlink()
    else:
        broken = file if damage == "cut" else folder(store, 20) / "manifest.json"
        broken.write_bytes(broken.read_bytes()[:40])
    loaded = checkpoints(store).load_newest()
    same(loaded, 10)
    assert len(loaded.broken) == 1 and "00000020" in loaded.broken[0]
    assert checkpoints(store).steps() == [10]
    save(store, 20)
    same(checkpoints(store).load_newest(), 20)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "hidden_size", 64, r"`model.hidden_size` is 32 there and 64 here"),
        ("train", "learning_rate", 0.02, r"`train.learning_rate` is 0.01 there and 0.02 here"),
        ("train", "z_loss", 0.1, r"`train.z_loss` is None there and 0.1 here"),
    ],
)
def test_another_training_is_refused(store, section, key, value, message):
    save(store, 10)
    other = IDENTITY | {section: IDENTITY[section] | {key: value}}
    with pytest.raises(ArtifactError, match=message):
        checkpoints(store, other).load_newest()


def test_large_states_are_cut_in_files(store, monkeypatch):
    monkeypatch.setattr("stillhouse.training.checkpoint._SHARD_BYTES", 50)
    save(store, 10)
    assert len(list(folder(store, 10).glob("model-*"))) == 2
    same(checkpoints(store).load_newest(), 10)


def test_a_failed_write_is_told_and_the_others_stay(store):
    save(store, 10)
    writer = checkpoints(store)
    folder(store, 20).write_bytes(b"in the way")
    writer.save(snapshot(20))
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        writer.wait()
    writer.wait()  # told once
    folder(store, 20).unlink()
    same(checkpoints(store).load_newest(), 10)


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


def test_a_process_that_dies_in_the_middle_leaves_the_others_valid(store):
    save(store, 10)
    run = [sys.executable, "-c", DYING, store.uri, "1"]
    path = os.pathsep.join([os.getcwd(), str(Path(__file__).parent)])
    assert subprocess.run(run, env=os.environ | {"PYTHONPATH": path}).returncode == 9
    assert len(list(folder(store, 20).iterdir())) == 1  # and no manifest
    same(checkpoints(store).load_newest(), 10)
    save(store, 20)
    same(checkpoints(store).load_newest(), 20)
