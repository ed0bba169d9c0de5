"""The decoupled methods by their units: on noise of three classes, and on digits."""

import datasets
import numpy as np
import pytest
import torch
from small_networks import PLAIN, noise, teacher
from stages import IMAGES, TEACHER, do, elsewhere, host_of, protocol

import stillhouse
from stillhouse.distillation.decoupled import (
    AssemblyTask,
    TeacherTask,
    UnitTask,
    unit_images,
)
from stillhouse.distillation.evaluate import mean_logits
from stillhouse.distillation.methods.infer import Infer
from stillhouse.distillation.methods.nrr_dd import NrrDd, activation_map, critical_patches
from stillhouse.distillation.methods.rded import Rded
from stillhouse.distillation.methods.sre2l import Sre2l, recover
from stillhouse.distillation.prepared import Prepared, Teacher
from stillhouse.distillation.recipes import Recipe
from stillhouse.distillation.set_tasks import (
    REAL,
    EvaluationTask,
    ResultTask,
    SetSource,
    stored_set,
)
from stillhouse.distillation.stored_sets import (
    CompensatedSet,
    expanded_set,
    flat_values,
    png_bytes,
    set_table,
)
from stillhouse.jobs.verify import verify
from stillhouse.storage.parquet import read_table

NOISE, LABELS = PLAIN.clip(noise(18, 1, 8, 8)), torch.arange(18) % 3
PART = NOISE, LABELS
CPU = torch.device("cpu")
PREPARED = Prepared(NOISE, LABELS, PART, PART, PLAIN, None, ("a", "b", "c"), CPU)
TEACHERS = [teacher(), teacher(1)]
NAMES = tuple(Teacher(TEACHER, str(i) * 64) for i in range(2))
METHODS = {
    "sre2l": Sre2l(name="sre2l", images_per_class=2, iterations=3, batch_size=4, jitter=1),
    "infer": Infer(name="infer", images_per_class=2, iterations=3, jitter=1),
    "rded": Rded(name="rded", images_per_class=2),
    "nrr_dd": NrrDd(name="nrr_dd", images_per_class=2, iterations=3, batch_size=4),
}


def noisy(folder):
    """A host of the noise and of teachers nobody trained."""
    host = host_of(folder, PREPARED)
    host.teachers |= {n.weights: t for n, t in zip(NAMES, TEACHERS, strict=True)}
    return host


@pytest.fixture
def host(tmp_path):
    return noisy(tmp_path)


def method(name, **changes):
    changed = METHODS[name].model_dump() | {"labels": "classes"} | changes
    return type(METHODS[name]).model_validate(changed)


def units(host, asked, teachers=NAMES, classes=3):
    """The units' parts, stage by stage."""
    stages = [()]
    for stage in asked.stages:
        tasks = [
            UnitTask(IMAGES, asked, stage, unit, teachers[unit.teacher], stages[-1])
            for unit in asked.units(stage, len(teachers), classes)
        ]
        stages.append(tuple(do(host, task).parts[0] for task in tasks))
    return stages[1:]


def assembled(host, asked, teachers=NAMES, classes=3, by=None):
    parts = units(host, asked, teachers, classes)[-1]
    return do(host, AssemblyTask(IMAGES, asked, by or protocol(), teachers, parts))


def made(host, asked):
    return stored_set(host.store, assembled(host, asked).parts[0])


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_pixels_of_every_class(tmp_path, name):
    first, again, other = (
        made(noisy(tmp_path / folder), method(name, seed=seed))
        for folder, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    counts = torch.bincount(first.labels)
    assert len(counts) == 3 and len(set(counts.tolist())) == 1
    pixels = PLAIN.pixels(first.images)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


@pytest.mark.parametrize("name", ["sre2l", "rded", "nrr_dd"])
def test_images_are_8_bits_and_labels_are_counted(host, name):
    found = made(host, method(name))
    rounded = PLAIN.apply(PLAIN.to_bytes(found.images) / 255)
    torch.testing.assert_close(found.images, rounded, rtol=0, atol=1e-6)
    assert (found.stored.images, found.stored.labels) == (6 * 64, 6)
    soft = made(host, method(name, labels="static"))
    assert (soft.stored.images, soft.stored.labels) == (6 * 64, 6 * 3 * 2)
    logits = mean_logits(TEACHERS, found.images).half().float()
    torch.testing.assert_close(soft.label_logits, logits)


def test_a_worker_makes_its_unit_without_the_others(host):
    asked = method("sre2l", seed=7)
    whole = made(host, asked)
    rng = np.random.default_rng([7, 1])
    unit, _ = recover(TEACHERS[0], torch.tensor([1, 2]), (1, 8, 8), asked, PLAIN, rng=rng)
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(PLAIN.to_bytes(whole.images[4:]), PLAIN.to_bytes(unit))


def test_nrr_dd_refines_around_what_its_patches_show(host):
    asked = method("nrr_dd")
    starts, _ = units(host, asked)
    found = made(host, asked)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for label in range(3):
        rng = np.random.default_rng([0, label])
        initial = critical_patches(TEACHERS[0], NOISE, LABELS, label, 2, asked, rng)
        assert torch.equal(unit_images(host, starts[label]), initial)
        critical = activation_map(TEACHERS[0], initial, torch.full((2,), label)) >= asked.epsilon
        refined = PLAIN.to_bytes(found.images[found.labels == label])[:, 0]
        rounded = PLAIN.to_bytes(initial)[:, 0]
        assert torch.equal(refined[critical], rounded[critical])
        assert not torch.equal(refined, rounded)


@pytest.fixture(scope="module")
def taught(digits_host):
    """A teacher of digits."""
    task = TeacherTask(IMAGES, TEACHER, Recipe(epochs=2), 0)
    do(digits_host, task)
    return (Teacher(TEACHER, task.fingerprint),)


def test_infer_is_stored_apart_and_priced_so(digits_host, taught):
    store, asked = digits_host.store, Infer(name="infer", images_per_class=2, iterations=2)
    done = assembled(digits_host, asked, taught, 10)  # K = floor(2 / (1 + 1/10)) = 1
    assert done.info["stored"] == [10 * 64 + 64, 20 * 10 * 2]
    given = stored_set(store, done.parts[0])
    assert given.images.shape == (20, 1, 8, 8)
    norm = digits_host.prepared.standardisation
    originals = {tuple(i.flatten().tolist()) for i in norm.to_bytes(digits_host.prepared.train)}
    assert {tuple(i) for i in given.factored.real.flatten(0, 1).flatten(1).tolist()} <= originals
    assert given.label_logits.shape == (20, 10)

    totals = {"image_bytes": 11 * 64, "bytes": 11 * 64 + 20 * 10 * 2}
    result = ResultTask(IMAGES, done.parts[0], None, {}, {}, totals)
    do(digits_host, result)
    opened = stillhouse.open_distilled(store.path("distilled", result.fingerprint))
    for name, evaluated in (
        ("images", given.images),
        ("labels", given.labels),
        ("soft_labels", given.label_logits),
    ):
        assert np.array_equal(getattr(opened, name), evaluated.numpy())
    table = read_table(opened.parts[0].uri)
    stored = [flat_values(table, n).nbytes for n in ("values", "compensator", "label_logits")]
    assert stored == [10 * 64, 64, 20 * 10 * 2]
    assert sum(stored) == opened.num_bytes
    assert verify(opened.uri, 0)["problems"] == []


def test_rows_of_infer_are_read_by_datasets(digits_host, tmp_path):
    host = elsewhere(digits_host, tmp_path)
    real = torch.zeros(1, 10, 1, 8, 8, dtype=torch.uint8)
    apart = CompensatedSet(real, torch.ones(2, 1, 1, 8, 8, dtype=torch.int8))
    norm, path = host.prepared.standardisation, "distilled/parts/one.parquet"
    given = expanded_set(apart, norm.ranges).with_logits(torch.zeros(30, 10))
    part = host.store.put_part(path, set_table(given), num_tokens=0)
    task = ResultTask(IMAGES, part, None, {}, {}, {"bytes": 1})
    do(host, task)
    files = host.store.path("distilled", task.fingerprint, "part-*.parquet")
    found = datasets.load_dataset("parquet", data_files=files, split="train")
    assert len(found) == 12
    assert found.features["label"].names == [str(digit) for digit in range(10)]
    assert (found[9]["label"], found[9]["compensator"]) == (9, None)
    assert (found[10]["label"], found[10]["values"]) == (None, None)
    assert np.array(found[9]["label_logits"]).shape == (3, 10)
    assert found[11]["compensator"] == [1] * 64
    assert found[9]["image"].getpixel((0, 0)) == 0
    assert found[11]["image"].getpixel((0, 0)) == 129


def test_nrr_dd_stores_two_distances_a_view(digits_host, taught):
    asked = NrrDd(name="nrr_dd", images_per_class=1, iterations=2, num_candidates=5)
    by = protocol("p3", epochs=3)
    starts, _ = units(digits_host, asked, taught, 10)
    done = assembled(digits_host, asked, taught, 10, by)
    assert done.info["stored"] == [640, 10 + 3 * 10 * 2 * 2]
    part = done.parts[0]
    task = ResultTask(IMAGES, part, None, {}, {}, {}, shown=((2, part),), real=True, starts=starts)
    rows = task.pictures(digits_host).to_pylist()
    assert [(row["point"], row["label"]) for row in rows] == [
        (point, label) for point in (REAL, 2) for label in range(10)
    ]
    patch = digits_host.prepared.preprocessing.pixels(unit_images(digits_host, starts[4]))
    assert rows[4]["png"] == png_bytes(patch)[0]
    source = SetSource(done.parts[0], done.info["label_path"], asked)
    task = EvaluationTask(IMAGES, source, TEACHER, by, (), "validation", 0)
    assert 0 <= do(digits_host, task).info["accuracy"] <= 1
