"""Objectives of classifiers in trainings: on two workers as on one, resumed, with their teachers;
what is dropped leaves outputs as they are.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from image_parts import (
    CLASSES,
    NAME,
    VIT,
    KilledError,
    batch,
    facts,
    losses,
    make_task,
    manifest,
    put_images,
    put_unlabelled,
    quiet,
    stop_at,
)
from safetensors.torch import load_file, save_file

from stillhouse.classification.learner import ImageLearner
from stillhouse.classification.signals import LogitsTask
from stillhouse.classification.stored import BuiltFrom, load_teacher
from stillhouse.classification.stream import bags_of
from stillhouse.classification.task import StoredClassifier
from stillhouse.classification.worker import train_classifier
from stillhouse.distillation.prepared import ImageHostSettings, Preparation, prepare
from stillhouse.errors import InputError
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import commit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.objectives.hybrid import Hybrid
from stillhouse.training.objectives.kd import Kd

TAUGHT = [{"path": "teacher"}]
OBJECTIVES = {
    "kd": {"name": "kd", "teachers": TAUGHT},
    "dhkd": {"name": "dhkd", "teachers": TAUGHT, "align": True},
    "one head": {"name": "dhkd", "teachers": TAUGHT, "heads": 1, "loss": "kl"},
    "weak_to_strong": {"name": "weak_to_strong", "teachers": TAUGHT},
    "bags": {"name": "bags", "bag_size": 4, "epsilon": 5.0},
    "lsskd": {"name": "lsskd"},
    "masked": {"name": "masked", "mask": 0.5},
    "hybrid": {"name": "hybrid", "teachers": [*TAUGHT, *TAUGHT], "drop": 0.5},
    "robust": {"name": "robust", "num_labelled": 16, "steps": 2},
    "unlabelled": {"name": "robust", "steps": 1},
    "self_past": {"name": "self_past", "lag": 1},
    "co_teaching": {"name": "co_teaching", "forget_rate": 0.3},
}


def host(store):
    return ImageHostSettings(Preparation(NAME, zca=False), "cpu").build(store)


def make_store(folder):
    """Images, and a teacher with its logits: the store, and what a task needs of the teacher."""
    store = Store(str(folder / "store"))
    put_images(store)
    task = make_task(num_epochs=3, seed=1)
    train_classifier(store, task, quiet)
    teacher = StoredClassifier("a" * 64, store.path("models", task.fingerprint))
    asked = LogitsTask(NAME, teacher, "train.objective.teachers.0")
    receipt = commit(store, asked, asked.run(store, host(store)))
    vits = []
    for objective in ({"name": "masked", "mask": 0.5}, {}):
        task = make_task(objective, VIT, num_epochs=1, seed=1)
        train_classifier(store, task, quiet)
        path = store.path("models", task.fingerprint)
        vits.append(StoredClassifier(task.fingerprint, path))
    found = {"teachers": [teacher], "logits": list(receipt.parts), "vits": vits}
    return store, found | {"unlabelled": put_unlabelled(store)}


def like(store, folder, logits):
    """Another store with the images and logits of one."""
    made = Store(str(folder))
    put_images(made)
    put_unlabelled(made)
    for part in logits:
        target = Path(made.path(part.path))
        target.parent.mkdir(parents=True)
        target.write_bytes(Path(store.path(part.path)).read_bytes())
    return made


def tasks(taught):
    """The trainings of all objectives, of 12 steps."""
    made = {}
    for name, objective in OBJECTIVES.items():
        given = {name: taught[name] for name in ("teachers", "logits") if "teachers" in objective}
        if name == "hybrid":
            given = {"teachers": taught["vits"]}
        if name == "unlabelled":
            given = {"unlabelled": taught["unlabelled"]}
        network = VIT if name in ("masked", "hybrid") else None
        made[name] = make_task(objective, network, num_epochs=2, eval_points=1, **given)
    return made


def worker(rank, folder, taught, count):
    """One of `count` processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=count)
    store = Store(f"{folder}/several")
    for task in tasks(taught).values():
        train_classifier(store, task, quiet, WorkerGroup.current())
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def trained(request, tmp_path_factory):
    """One process's results, those of several, and the tasks."""
    folder = tmp_path_factory.mktemp("objectives")
    store, taught = make_store(folder)
    several = like(store, folder / "several", taught["logits"])
    taught["logits"] = [replace(part, path=str(part.path)) for part in taught["logits"]]
    torch.multiprocessing.spawn(worker, (str(folder), taught, request.param), nprocs=request.param)
    made = tasks(taught)
    for task in made.values():
        train_classifier(store, task, quiet)
    return store, several, made


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_several_workers_train_as_one(trained, name):
    store, several, made = trained
    task = made[name]
    assert losses(several, task) == pytest.approx(losses(store, task), rel=1e-5)
    first, second = (manifest(one, task).totals for one in (store, several))
    assert first["order_sha256"] == second["order_sha256"]
    assert min(losses(store, task)) < losses(store, task)[0]


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_resumed_it_has_the_same_bytes(trained, name, tmp_path):
    """What objectives keep beside the network goes on where it was: heads, peers, past logits."""
    store, _, made = trained
    task = made[name]
    again = like(store, tmp_path / "again", task.logits)
    with pytest.raises(KilledError):
        train_classifier(again, task, stop_at(task.num_steps - 1))
    train_classifier(again, task, quiet)
    assert len(manifest(again, task).totals["measured"]["starts"]) == 2
    assert manifest(again, task).files == manifest(store, task).files


@pytest.mark.parametrize("name", ["kd", "hybrid"])
def test_teachers_in_the_workers_are_left_alone(trained, name):
    """In evaluation mode and without a graph, those that answer and those that are read inside."""
    store, _, made = trained
    prepared = prepare(store, Preparation(NAME, zca=False), torch.device("cpu"))
    teachers = [load_teacher(one, prepared, "teacher") for one in made[name].teachers]
    network = prepared.network(NetworkSettings.model_validate(VIT), 0)
    known = replace(facts(network), models=tuple(teachers))
    kind = {"kd": Kd, "hybrid": Hybrid}[name]
    learner = ImageLearner(
        network,
        None,
        made[name].settings,
        device=torch.device("cpu"),
        group=WorkerGroup(),
        make=lambda: kind(known),
        teachers=teachers if name == "kd" else (),
    ).train()
    before = [{k: v.clone() for k, v in one.state_dict().items()} for one in teachers]
    images, signals = batch()
    del signals["logits.0"]
    learner(images, signals).objective.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    for teacher, values in zip(teachers, before, strict=True):
        assert not any(module.training for module in teacher.network.modules())
        assert not teacher(images).requires_grad
        assert all(torch.equal(value, values[k]) for k, value in teacher.state_dict().items())
    kept = {id(parameter) for parameter in learner.trained.values()}
    assert kept.isdisjoint(id(one) for teacher in teachers for one in teacher.parameters())


def built_again(store, task):
    folder = Path(store.path("models", task.fingerprint))
    network = BuiltFrom.read((folder / "config.json").read_bytes()).build(3).eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network


@pytest.mark.parametrize("name", ["dhkd", "lsskd", "co_teaching"])
def test_what_is_dropped_leaves_outputs_as_they_are(trained, name):
    """The folder has the network alone, and measures what was measured in the training."""
    store, _, made = trained
    network = built_again(store, made[name])
    assert {name.split(".")[0] for name in network.state_dict()} == {"features", "classifier"}
    images, labels = prepare(store, Preparation(NAME, zca=False), torch.device("cpu")).test
    with torch.no_grad():
        right = (network(images).argmax(1) == labels).float().mean()
    assert manifest(store, made[name]).totals["test"]["accuracy"] == pytest.approx(float(right))


def test_held_out_bags_are_measured(trained):
    """Their shares against the mean probability, bag by bag: rho can be chosen by them."""
    store, _, made = trained
    validation = prepare(store, Preparation(NAME, zca=False), torch.device("cpu")).validation
    with torch.no_grad():
        probs = built_again(store, made["bags"])(validation[0]).double().softmax(1).numpy()
    losses = []
    for bag in bags_of(len(probs), 4, 0):
        shares = np.bincount(validation[1].numpy()[bag], minlength=CLASSES) / 4
        losses.append(-(shares * np.log(probs[bag].mean(0))).sum())
    last = manifest(store, made["bags"]).totals["evaluations"][-1]
    assert last["bag_nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert "bag_nll" not in manifest(store, made["kd"]).totals["evaluations"][-1]


def test_a_vit_reports_its_attention(trained):
    store, _, made = trained
    found = manifest(store, made["hybrid"]).totals["attention"]
    assert [len(found[name]) for name in ("distance", "nmi")] == [2, 2]
    assert 0 < found["distance"][0] < 2**0.5  # the mean over a grid of 2 x 2 is 0.85 if uniform
    assert all(0 <= value <= 1 for value in found["nmi"])
    assert manifest(store, made["kd"]).totals["attention"] is None


def test_a_teacher_that_does_not_fit_is_refused(trained, tmp_path):
    store, _, made = trained
    folder = tmp_path / "teacher"
    folder.mkdir()
    source = Path(store.path("models", made["kd"].fingerprint))
    content = json.loads((source / "config.json").read_text())
    weights = load_file(source / "weights.safetensors")
    prepared = prepare(store, Preparation(NAME, zca=False), torch.device("cpu"))
    stored, key = StoredClassifier("b" * 64, str(folder)), "train.objective.teachers.0"

    def put(changes, tensors):
        (folder / "config.json").write_text(json.dumps(content | changes))
        save_file(tensors, folder / "weights.safetensors")

    names = content["class_names"]
    put({"class_names": ["another", *names[1:]]}, weights)
    with pytest.raises(
        InputError, match=r"teachers\.0` does not know the class 'class 0' \(1 of 4"
    ):
        load_teacher(stored, prepared, key)
    put({}, weights | {"classifier.bias": torch.full((CLASSES,), torch.nan)})
    with pytest.raises(InputError, match="weights that are not finite"):
        load_teacher(stored, prepared, key)
    put({}, weights | {"classifier.bias": torch.full((CLASSES,), 1e30)})
    with pytest.raises(InputError, match="the logits of 96 of 96 images are not finite"):
        LogitsTask(NAME, stored, key).run(store, host(store))
    live = make_task({"name": "kd", "teachers": TAUGHT, "signals": "live"}, teachers=[stored])
    put({}, {name: 1e30 * value for name, value in weights.items()})
    with pytest.raises(InputError, match=r"teachers\.0`: its logits are not finite"):
        train_classifier(store, live, quiet)
    put({"class_names": names[::-1]}, weights)  # the same network, its classes renamed
    with torch.no_grad():
        turned = load_teacher(stored, prepared, key)(prepared.train[:5])
        expected = built_again(store, made["kd"])(prepared.train[:5]).flip(1)
    assert torch.equal(turned, expected)
