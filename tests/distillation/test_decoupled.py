"""The decoupled methods by their units, on noise of three classes and teachers nobody trained."""

import numpy as np
import pytest
import torch
from small_networks import PLAIN, noise, teacher
from stages import recipe

from stillhouse.distillation.decoupled_job import (
    AssemblyTask,
    plan_refinement,
    plan_units,
    run_assembly,
    run_unit,
    unit_images,
)
from stillhouse.distillation.labels import mean_logits
from stillhouse.distillation.methods import Infer, NrrDd, Rded, Sre2l
from stillhouse.distillation.nrr_dd import activation_map, critical_patches
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.sre2l import recover
from stillhouse.distillation.stored_sets import read_set
from stillhouse.errors import BudgetError, InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

IMAGES, LABELS = PLAIN.clip(noise(18, 1, 8, 8)), torch.arange(18) % 3
PREPARED = Prepared(
    *(IMAGES, LABELS) * 3, PLAIN, None, ("a", "b", "c"), torch.device("cpu"), "1" * 64
)
TEACHERS = [teacher(), teacher(1)]
METHODS = {
    "sre2l": Sre2l(name="sre2l", images_per_class=2, iterations=3, batch_size=4, jitter=1),
    "infer": Infer(name="infer", images_per_class=2, iterations=3, jitter=1),
    "rded": Rded(name="rded", images_per_class=2),
    "nrr_dd": NrrDd(name="nrr_dd", images_per_class=2, iterations=3, batch_size=4),
}


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def method(name, **changes):
    changed = METHODS[name].model_dump() | {"labels": "classes"} | changes
    return type(METHODS[name]).model_validate(changed)


def units(store, asked):
    """The units' parts of all stages, the last stage's behind the others'."""
    name = fingerprint(asked.model_dump())
    planned = plan_units(name, asked, len(TEACHERS), 3)
    stages = [[run_unit(store, PREPARED, TEACHERS, unit).parts[0].path for unit in planned]]
    if asked.name == "nrr_dd":
        planned = plan_refinement(name, asked, 3, stages[0])
        stages.append([run_unit(store, PREPARED, TEACHERS, u).parts[0].path for u in planned])
    return stages


def made(store, asked):
    task = AssemblyTask(
        fingerprint(asked.model_dump()), asked, recipe(), tuple(units(store, asked)[-1])
    )
    done = run_assembly(store, PREPARED, TEACHERS, task)
    return read_set(read_table(store.path(done.parts[0].path)), "here")


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_pixels_of_every_class(tmp_path, name):
    stores = [Store(str(tmp_path / str(i))) for i in range(3)]
    first, again, other = (
        made(at, method(name, seed=seed)) for at, seed in zip(stores, (3, 3, 4), strict=True)
    )
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    counts = torch.bincount(first.labels)
    assert len(counts) == 3 and len(set(counts.tolist())) == 1
    pixels = PLAIN.pixels(first.images)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


@pytest.mark.parametrize("name", ["sre2l", "rded", "nrr_dd"])
def test_images_are_8_bits_and_labels_are_counted(store, name):
    found = made(store, method(name))
    rounded = PLAIN.from_bytes(PLAIN.to_bytes(found.images))
    torch.testing.assert_close(found.images, rounded, rtol=0, atol=1e-6)
    assert (found.stored.images, found.stored.labels) == (6 * 64, 6)
    soft = made(store, method(name, labels="static"))
    assert (soft.stored.images, soft.stored.labels) == (6 * 64, 6 * 3 * 2)
    logits = mean_logits(TEACHERS, found.images).half().float()
    torch.testing.assert_close(soft.label_logits, logits)


def test_a_worker_makes_its_unit_without_the_others(store):
    asked = method("sre2l", seed=7)
    whole = made(store, asked)
    rng = np.random.default_rng([7, 1])
    unit, _ = recover(TEACHERS[0], torch.tensor([1, 2]), (1, 8, 8), asked, PLAIN, rng=rng)
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(PLAIN.to_bytes(whole.images[4:]), PLAIN.to_bytes(unit))


def test_infer_stores_its_parts_and_refuses_too_small_a_budget(store):
    found = made(store, method("infer", images_per_class=4, labels="static"))
    # K = 4 * 3 // (3 + 2) = 2 real images of each class, 2 * 2 compensators
    assert found.stored.images == 2 * 3 * 64 + 2 * 2 * 64
    assert found.stored.labels == 18 * 3 * 2 and found.images.shape == (18, 1, 8, 8)
    originals = {tuple(image.flatten().tolist()) for image in PLAIN.to_bytes(IMAGES)}
    kept = found.apart.real.flatten(0, 1).flatten(1).tolist()
    assert all(tuple(image) in originals for image in kept)
    assert torch.equal(PLAIN.to_bytes(found.images), found.apart.expand())
    hard = made(store, method("infer", images_per_class=4))
    assert hard.stored.labels == 6  # the class of each real image
    with pytest.raises(BudgetError, match="at least 2 are needed"):
        units(store, method("infer", images_per_class=1))


def test_nrr_dd_refines_around_what_its_patches_show(store):
    asked = method("nrr_dd")
    starts, _ = units(store, asked)
    found = made(store, asked)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for label in range(3):
        rng = np.random.default_rng([0, label])
        initial = critical_patches(
            TEACHERS[0], IMAGES, LABELS, label, images_per_class=2, settings=asked, rng=rng
        )
        assert torch.equal(unit_images(store, starts[label], (1, 8, 8)), initial)
        critical = activation_map(TEACHERS[0], initial, torch.full((2,), label)) >= asked.epsilon
        refined = PLAIN.to_bytes(found.images[found.labels == label])[:, 0]
        rounded = PLAIN.to_bytes(initial)[:, 0]
        assert torch.equal(refined[critical], rounded[critical])
        assert not torch.equal(refined, rounded)


@pytest.mark.parametrize(("name", "count"), [("rded", 7), ("infer", 12)])
def test_more_images_than_a_class_has(store, name, count):
    with pytest.raises(InputError, match="class 0 has 6 training images, 7"):
        units(store, method(name, images_per_class=count))
