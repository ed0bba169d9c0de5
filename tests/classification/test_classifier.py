"""Trainings of classifiers in this process: results, resume, augmentation, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_parts import (
    COUNTS,
    KilledError,
    losses,
    make_set,
    make_task,
    manifest,
    put_images,
    quiet,
    stop_at,
)
from safetensors.torch import load_file

from stillhouse.classification.stored import BuiltFrom
from stillhouse.classification.stream import ImageStream, augmented, bags_of
from stillhouse.classification.worker import train_classifier
from stillhouse.custom_code import find_named
from stillhouse.errors import SpecError
from stillhouse.storage.artifact import Store
from stillhouse.training.group import WorkerGroup
from stillhouse.training.order import Rows, SampleOrder

RESNET = {"name": "resnet18", "width": 4}


@pytest.fixture
def store(tmp_path):
    made = Store(str(tmp_path / "store"))
    put_images(made)
    return made


def test_it_learns_and_is_built_again_from_its_folder(store):
    task = make_task()
    train_classifier(store, task, quiet)
    made = manifest(store, task)
    folder = Path(store.path("models", task.fingerprint))
    built = BuiltFrom.read((folder / "config.json").read_bytes())
    network = built.build(7).eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    train, test = make_set(0, COUNTS[0]), make_set(2, COUNTS[2])
    pixels = train.images.astype(np.float64) / 255
    assert built.standardisation.mean == pytest.approx((pixels.mean(),))
    assert built.standardisation.std == pytest.approx((pixels.std(),))
    images = torch.from_numpy((test.images / 255 - pixels.mean()) / pixels.std()).float()
    with torch.no_grad():
        right = network(images).argmax(1).numpy() == test.labels
    assert made.totals["test"]["accuracy"] == right.mean() > 0.9
    assert made.totals["num_tokens"] == 30 * 16 == 5 * COUNTS[0]
    assert [one["step"] for one in made.totals["evaluations"]] == [10, 20, 30]
    assert json.loads((folder / "config.json").read_text())["class_names"][0] == "class 0"


@pytest.mark.parametrize("network", [None, RESNET])
def test_a_training_that_was_stopped_ends_with_the_same_bytes(store, tmp_path, network):
    """Statistics of batch norm are in the checkpoints."""
    task = make_task(network=network, augmentation=["flip", "crop"], num_epochs=3)
    train_classifier(store, task, quiet)
    again = Store(str(tmp_path / "again"))
    put_images(again)
    with pytest.raises(KilledError):
        train_classifier(again, task, stop_at(15))
    train_classifier(again, task, quiet)
    assert len(manifest(again, task).totals["measured"]["starts"]) == 2
    assert manifest(again, task).files == manifest(store, task).files
    if network is not None:
        folder = Path(again.path("models", task.fingerprint))
        weights = load_file(folder / "weights.safetensors")
        assert int(weights["features.1.num_batches_tracked"]) == task.num_steps


def test_micro_batches_change_no_losses(store):
    whole, parts = make_task(), make_task(micro_batch=5)
    for task in (whole, parts):
        train_classifier(store, task, quiet)
    assert losses(store, parts) == pytest.approx(losses(store, whole), rel=1e-5)


def stream(rank=0, num_workers=1, size=1):
    task = make_task({"bag_size": size, "name": "mine:Own"})
    labels = torch.arange(COUNTS[0])
    images = torch.rand(COUNTS[0], 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageStream(
        task.order(),
        images,
        {"labels": labels},
        bags_of(COUNTS[0], size, 0),
        rank=rank,
        num_workers=num_workers,
        augmentation=("flip", "crop"),
    )


def test_workers_share_every_batch_and_augmentation_depends_on_none_of_them():
    alone, *several = stream(), *(stream(rank, 2) for rank in range(2))
    for _ in range(8):
        whole, parts = alone.next_batch(), [one.next_batch() for one in several]
        assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
        rows = whole.signals["labels"].numpy()
        assert (whole.samples == np.stack([np.zeros_like(rows), rows], 1)).all()
        assert (whole.samples == np.concatenate([part.samples for part in parts])).all()
    resumed = stream()
    resumed.load_state_dict(alone.state_dict())
    assert torch.equal(resumed.next_batch().inputs, alone.next_batch().inputs)


def test_an_epoch_has_every_image_once():
    batches = [one.next_batch().samples[:, 1] for one in [stream()] for _ in range(6)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(COUNTS[0]))


def test_bags_stay_together():
    bags = {tuple(bag) for bag in bags_of(COUNTS[0], 4, 0).tolist()}
    assert len(bags) == COUNTS[0] // 4
    for rank in range(2):
        one = stream(rank, 2, size=4)
        for _ in range(14):
            rows = one.next_batch().samples[:, 1].reshape(-1, 4)
            assert all(tuple(bag) in bags for bag in rows.tolist())


def test_a_row_is_augmented_by_itself():
    images, rows = torch.rand(6, 3, 16, 16), np.arange(6)
    whole = augmented(images, rows, ("flip", "crop"), 1, np.full(6, 2))
    order = np.array([4, 1, 3])
    twos = np.full(3, 2)
    assert torch.equal(augmented(images[order], order, ("flip", "crop"), 1, twos), whole[order])
    assert not torch.equal(augmented(images, rows, ("flip", "crop"), 1, np.full(6, 3)), whole)


def test_a_fixed_number_of_views_and_their_signals():
    """Every step shows one of three views of an image, with that view's signals."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((8, 1, 16, 16), np.float32))
    numbers = torch.arange(8)[:, None, None] * 10 + torch.arange(3)[None, :, None]
    order = SampleOrder([Rows((8,))], global_batch=8, seed=5, lanes=1, window=8)
    made = ImageStream(
        order, images, {"view": numbers}, bags_of(8, 1, 5), augmentation=("crop",), views=3
    )
    shown = {}
    for _ in range(30):
        batch = made.next_batch()
        for image, row, number in zip(
            batch.inputs,
            batch.samples[:, 1].tolist(),
            batch.signals["view"][:, 0].tolist(),
            strict=True,
        ):
            assert number // 10 == row
            shown.setdefault(number, set()).add(image.numpy().tobytes())
    assert sorted(shown) == [10 * row + view for row in range(8) for view in range(3)]
    assert {len(found) for found in shown.values()} == {1}
    assert len({image for found in shown.values() for image in found}) > 2 * 8


def test_batch_norm_is_refused_where_batches_are_split(store, monkeypatch):
    group = WorkerGroup()
    monkeypatch.setattr(group, "size", 2)
    with pytest.raises(SpecError, match=r"`compute\.trainers` above 1 splits batches"):
        train_classifier(store, make_task(network=RESNET), quiet, group)


def test_dropout_resumes_exactly(store, tmp_path, monkeypatch):
    """Its draws depend on seed and step alone."""
    network = {"name": "dropping_networks:Dropping"}
    task = make_task(network=network, num_epochs=3)
    train_classifier(store, task, quiet)
    again = Store(str(tmp_path / "again"))
    put_images(again)
    with pytest.raises(KilledError):
        train_classifier(again, task, stop_at(15))
    torch.manual_seed(123)
    train_classifier(again, task, quiet)
    assert manifest(again, task).files == manifest(store, task).files


def test_unknown_settings_are_refused_by_name(store):
    with pytest.raises(SpecError, match=r"`train.objective: cross_entropy`.*'tempo'"):
        train_classifier(store, make_task({"tempo": 3}), quiet)


def test_an_objective_of_ones_own(store):
    """Its code is sent along, and is part of the name."""
    name = "own_loss:Scaled"
    task = make_task({"name": name, "factor": 0.0}, num_epochs=1)
    own = replace(task, own=find_named("train.objective.name", name))
    train_classifier(store, own, quiet)
    assert own.fingerprint != task.fingerprint
    made = manifest(store, own)
    assert made.settings["train"]["objective"]["code"] == own.own.digest
    assert made.totals["points"][-1]["grad_norm"] == 0
