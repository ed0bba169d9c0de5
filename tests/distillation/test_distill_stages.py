"""The stages of a distil job without Ray, on the digits and a network of a few hundred weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from stages import (
    EXPERTS,
    IMAGES,
    NETWORK,
    NONE_SHOWN,
    TEACHER,
    TINY,
    matching,
    part_bytes,
    quiet,
    recipe,
    sets,
)
from torch import nn

import stillhouse
from stillhouse.distillation.controls_job import ControlTask, run_control
from stillhouse.distillation.evaluate_job import (
    EvaluationTask,
    SetSource,
    run_evaluation,
)
from stillhouse.distillation.expert_job import (
    ExpertTask,
    TeacherTask,
    run_expert,
    run_teacher,
)
from stillhouse.distillation.expert_options import expert_options, kept_epochs
from stillhouse.distillation.matching_job import (
    require_no_batch_norm,
    run_matching,
)
from stillhouse.distillation.methods import Ast, Datm, ExpertSettings, Mtt
from stillhouse.distillation.pictures import Shown, pictures
from stillhouse.distillation.result_job import ResultTask, run_result
from stillhouse.distillation.settings import Recipe
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.stored_sets import (
    read_set,
)
from stillhouse.errors import ArtifactError, DivergedError, ModelError, SpecError
from stillhouse.models.device import peak_bytes
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

FACTORY = NetworkSettings(name="factory", factory=f"{__name__}:dropping", options={"p": 0.0})


def test_a_tasks_peak_memory_is_its_own(kitchen):
    """Not that of what the process did before."""
    store, prepared = kitchen
    large = torch.ones(400 << 20, dtype=torch.uint8)
    before = peak_bytes(torch.device("cpu"))
    del large
    task = matching(store, Mtt(name="mtt", **TINY), name="e" * 64)
    run_matching(store, prepared, task, quiet)
    assert all(r.info["peak_bytes"] < before - (300 << 20) for r in sets(store, task))


class Killed(Exception):
    pass


def test_images_are_kept_as_they_are_split(kitchen):
    store, prepared = kitchen
    manifest = store.get_manifest("images", IMAGES)
    assert [part.num_rows for part in manifest.parts] == [199, 143, 359]
    assert manifest.totals["class_names"] == [str(digit) for digit in range(10)]
    assert prepared.train.shape == (199, 1, 8, 8)
    assert manifest.totals["least_per_class"] == int(torch.bincount(prepared.train_labels).min())


@pytest.mark.parametrize(
    "method",
    [
        Mtt(name="mtt", **TINY),
        Ast(name="ast", **TINY, image_rate=1.0),
        Datm(name="datm", **TINY),
    ],
    ids=lambda method: method.name,
)
def test_killed_distillation_goes_on_to_the_same_bytes(kitchen, tmp_path, method):
    store, prepared = kitchen
    whole = matching(store, method, name=method.name.ljust(64, "0"))
    run_matching(store, prepared, whole, quiet)
    assert len(sets(store, whole)) == 3

    def die(done, total):
        if done == 3:
            raise Killed

    again = Store(str(tmp_path))
    task = dataclasses.replace(whole, fingerprint="d" * 64)
    with pytest.raises(Killed):
        run_matching(again, prepared, task, die)
    assert len(sets(again, task)) == 2
    run_matching(again, prepared, task, quiet)
    assert part_bytes(again, task) == part_bytes(store, whole)
    assert [len(r.info["losses"]) for r in sets(again, task)] == [0, 2, 2]


@pytest.mark.parametrize("iteration", [0, 2, 4])
@pytest.mark.parametrize("kind", ["parts", "receipts"])
def test_sets_that_were_deleted_are_made_again(kitchen, tmp_path, kind, iteration):
    store = Store(str(tmp_path))
    task = matching(kitchen[0], Mtt(name="mtt", **TINY))
    run_matching(store, kitchen[1], task, quiet)
    before, folder = part_bytes(store, task), tmp_path / "distilled" / kind
    (gone,) = folder.glob(f"{task.receipt(iteration)}.*")
    gone.unlink()
    done = []
    run_matching(store, kitchen[1], task, lambda step, _: done.append(step))
    assert part_bytes(store, task) == before
    # from the newest checkpoint before it, of the two that are kept
    assert done == ([3, 4] if iteration == 4 else [1, 2, 3, 4])


def test_divergence_keeps_the_sets_before_it(kitchen, tmp_path):
    _, prepared = kitchen
    store = Store(str(tmp_path))
    method = Mtt(name="mtt", **(TINY | {"num_iterations": 60}), image_rate=1e38, learning_rate=1.0)
    task = matching(kitchen[0], method)
    with pytest.raises(DivergedError, match="image_rate"):
        run_matching(store, prepared, task, quiet)
    assert len(sets(store, task)) == 1


def test_segments_without_a_finite_loss_are_skipped_and_leave_no_loss(kitchen, tmp_path):
    _, prepared = kitchen
    store = Store(str(tmp_path))
    still = dataclasses.replace(expert_options(EXPERTS, "mtt", ()), learning_rate=0.0)
    for name in ("a" * 64, "b" * 64):
        run_expert(store, prepared, ExpertTask(name, NETWORK, still, (0, 1, 2, 3), "float32", 0))
    task = matching(store, Mtt(name="mtt", **TINY, max_loss=1.0))
    run_matching(store, prepared, task, quiet)
    assert [r.info["losses"] for r in sets(store, task)] == [[], [], []]
    assert len(set(part_bytes(store, task))) == 1  # nothing was changed


def test_an_expert_says_what_it_saw(kitchen):
    store, _ = kitchen
    manifest = store.get_manifest("trajectories", "a" * 64)
    assert (manifest.inputs, manifest.settings["zca"]) == ({"images": IMAGES}, False)


def test_experts_of_another_network_are_refused(kitchen):
    store, prepared = kitchen
    wider = NetworkSettings(depth=2, width=4)
    task = matching(store, Mtt(name="mtt", **TINY), network=wider)
    with pytest.raises(ArtifactError, match=r"features\.0\.weight is \(3, 1, 3, 3\) there"):
        run_matching(store, prepared, task, quiet)


def test_a_window_that_leaves_the_stored_epochs_is_refused_before_any_step(kitchen, tmp_path):
    store, prepared = kitchen
    options = expert_options(EXPERTS, "mtt", ())
    short = ExpertTask("0" * 64, NETWORK, options, (0, 2, 3), "float32", 2)
    run_expert(store, prepared, short)
    task = matching(store, Ast(name="ast", **TINY))
    task = dataclasses.replace(task, experts=(store.path("trajectories", "0" * 64),))
    with pytest.raises(ArtifactError, match=r"holds epochs 0, 2 to 3, not 1: .*max_start_epoch"):
        run_matching(Store(str(tmp_path)), prepared, task, quiet)
    mtt = Mtt(name="mtt", **TINY, max_start_epoch=1)
    run_matching(store, prepared, dataclasses.replace(task, method=mtt), quiet)


def test_lost_trajectories_and_teachers_are_tasks_to_do_again(tmp_path, kitchen):
    _, prepared = kitchen
    store = Store(str(tmp_path))
    options = dataclasses.replace(expert_options(EXPERTS, "mtt", ()), num_epochs=1)
    tasks = {
        "trajectories": ExpertTask("a" * 64, NETWORK, options, (0, 1), "float32", 0),
        "models": TeacherTask("b" * 64, TEACHER, Recipe(epochs=1), 0),
    }
    for kind, run in (("trajectories", run_expert), ("models", run_teacher)):
        made = run(store, prepared, tasks[kind])
        (file,) = [tmp_path / part.path for part in made.parts]
        data = file.read_bytes()
        file.unlink()
        assert not store.finished(kind, [tasks[kind].fingerprint])
        assert run(store, prepared, tasks[kind]) == made
        assert file.read_bytes() == data


def test_workers_do_not_share_batches_of_a_network_with_batch_norm(kitchen):
    _, prepared = kitchen
    with pytest.raises(SpecError, match=r"has batch norm.*`compute.distillers` to 1"):
        require_no_batch_norm(prepared.network(TEACHER, 0), TEACHER.label)
    require_no_batch_norm(prepared.network(NETWORK, 0), NETWORK.label)


def dropping(num_channels, image_size, num_classes, p):
    layers = [nn.Flatten(), nn.Dropout(p), nn.Linear(num_channels * image_size**2, num_classes)]
    return nn.Sequential(*layers)


def test_a_network_that_drops_out_is_no_function_of_its_parameters(kitchen):
    _, prepared = kitchen
    with pytest.raises(ModelError, match=r"dropping, p 0.5 drops out at random \(1\)"):
        prepared.flat(FACTORY.model_copy(update={"options": {"p": 0.5}}), 0)
    assert prepared.flat(FACTORY, 0).num_parameters == 650


def test_only_epochs_that_are_read_are_kept():
    experts = ExpertSettings(count=1, epochs=50)
    mtt = Mtt(name="mtt", images_per_class=1, min_start_epoch=2, max_start_epoch=5)
    assert kept_epochs(experts, mtt) == (2, 3, 4, 5, 6)
    ast = Ast(name="ast", images_per_class=1, max_start_epoch=2)
    assert kept_epochs(experts, ast) == (0, 1, 2, 3, 50)


def test_evaluation_and_controls(kitchen):
    store, prepared = kitchen
    control = ControlTask("e" * 64, "random_real", 20, 0)
    receipt = run_control(store, prepared, control)
    given = read_set(read_table(store.path(receipt.parts[0].path)), "here")
    assert given.stored.total == 20 * 65
    assert given.labels.tolist() == [label for label in range(10) for _ in range(2)]
    rows = (prepared.train[:, None] - given.images[None, :, :, :]).abs().amax((2, 3, 4))
    assert float(rows.amin(0).max()) < 1e-4  # they are training images

    source = SetSource(receipt.parts[0].path)
    task = EvaluationTask("f" * 64, source, NETWORK, recipe(), (), "validation", 0)
    augmented = dataclasses.replace(task, fingerprint="0" * 64, augmentation=("crop", "scale"))
    losses = []
    for one in (task, augmented):
        found = run_evaluation(store, prepared, one)
        assert 0 <= found.info["accuracy"] <= 1
        other = dataclasses.replace(one, fingerprint="9" + one.fingerprint[1:])
        again = run_evaluation(store, prepared, other)
        assert again.info | {"seconds": 0} == found.info | {"seconds": 0}
        losses.append(found.info["loss"])
    assert losses[0] != losses[1]


def test_result_opens_as_it_was_made_and_in_datasets(kitchen):
    store, prepared = kitchen
    task = matching(store, Datm(name="datm", **TINY), name="7" * 64)
    run_matching(store, prepared, task, quiet)
    best = sets(store, task)[-1]
    result = ResultTask("8" * 64, best.parts[0].path, None, {}, {}, {"bytes": 1240}, NONE_SHOWN)
    run_result(store, prepared, result)
    opened = stillhouse.open_distilled(store.path("distilled", "8" * 64))
    assert opened.images.shape == (10, 1, 8, 8)
    assert opened.images.dtype == np.float32
    assert opened.labels.tolist() == list(range(10))
    assert opened.soft_labels.shape == (10, 10)
    assert opened.learning_rate == pytest.approx(best.info["learning_rate"])
    assert opened.preprocessing["mean"] == pytest.approx(prepared.standardisation.mean)
    assert opened.num_bytes == 1240
    found = opened.to_datasets()
    assert found[3]["image"].size == (8, 8)
    assert found.features["label"].names == [str(digit) for digit in range(10)]
    values = np.array(found[3]["values"], np.float32).reshape(1, 8, 8)
    header = json.loads(read_table(opened.parts[0].uri).schema.metadata[b"stillhouse"])
    (low, step) = header["ranges"][0]
    assert low + values * step == pytest.approx(opened.images[3], abs=1e-5)


def test_pictures_of_every_class(kitchen):
    store, prepared = kitchen
    task = matching(store, Mtt(name="mtt", **TINY), name="6" * 64)
    run_matching(store, prepared, task, quiet)
    points = tuple((i, r.parts[0].path) for i, r in enumerate(sets(store, task)))
    rows = pictures(store, prepared, Shown(points, 3, True)).to_pylist()
    assert {row["point"] for row in rows} == {-1, 0, 1, 2}
    assert all(row["png"].startswith(b"\x89PNG") for row in rows)
    assert sum(row["point"] == -1 for row in rows) == 30


def test_a_result_has_its_pictures_beside_the_artifact(kitchen):
    store, prepared = kitchen
    task = matching(store, Mtt(name="mtt", **TINY), name="b" * 64)
    run_matching(store, prepared, task, quiet)
    path = sets(store, task)[-1].parts[0].path
    result = ResultTask("9" * 64, path, None, {}, {}, {}, Shown(((4, path),), 1, False))
    (_, drawn) = run_result(store, prepared, result).parts
    shown = read_table(store.path(drawn.path)).to_pylist()
    manifest = store.get_manifest("distilled", "9" * 64)
    (part,) = manifest.parts
    delivered = read_table(store.path(part.path))["image"].to_pylist()
    assert [row["png"] for row in shown] == [image["bytes"] for image in delivered]
