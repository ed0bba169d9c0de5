"""Checkpoints of a training on every kind of store: the last and best, and damage."""

import torch

from stillhouse.storage.filesystem import filesystem, list_names
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.state import Snapshot

NAME = "c" * 64


def save(store, step, score):
    with Checkpoints(store, NAME, {"seed": 0}) as checkpoints:
        tensors = {
            "model.weight": torch.full((2, 2), step),
            "optimizer.step.weight": torch.ones(()),
        }
        checkpoints.save(Snapshot(tensors, {"step": step}), score)


def test_kept_removed_and_passed_over(store):
    for step, score in [(1, 3.0), (2, 2.0), (3, 2.5), (4, 2.6)]:
        save(store, step, score)
    checkpoints = Checkpoints(store, NAME, {"seed": 0})
    assert checkpoints.steps() == [2, 3, 4]
    folder = store.path("checkpoints", NAME)
    assert list_names(folder) == ["00000002", "00000003", "00000004"]
    newest = checkpoints.load_newest()
    assert newest.step == 4 and newest.snapshot.tensors["model.weight"].tolist() == [[4, 4]] * 2

    fs, path = filesystem(f"{folder}/00000004")
    damaged = next(name for name in list_names(f"{folder}/00000004") if "optimizer" in name)
    fs.pipe_file(f"{path}/{damaged}", b"damaged")
    loaded = checkpoints.load_newest()
    assert loaded.step == 3 and damaged in loaded.broken[0]
    assert list_names(folder) == ["00000002", "00000003"]
    save(store, 4, None)
    assert checkpoints.load_newest().step == 4
