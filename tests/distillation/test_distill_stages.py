"""The stages of a distil job without Ray, on the digits and a network of a few hundred weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stages import (
    IMAGES,
    NETWORK,
    TEACHER,
    TINY,
    do,
    elsewhere,
    expert,
    host_of,
    matching,
    part_bytes,
    protocol,
    sets,
)
from torch import nn

import stillhouse
from stillhouse.distillation.decoupled import TeacherTask
from stillhouse.distillation.images import ImageData
from stillhouse.distillation.matching_task import require_no_batch_norm, run_matching
from stillhouse.distillation.methods.ast import Ast
from stillhouse.distillation.methods.datm import Datm
from stillhouse.distillation.methods.mtt import Mtt
from stillhouse.distillation.prepared import DEAD_LETTERS, ImagesTask, Preparation
from stillhouse.distillation.recipes import Recipe
from stillhouse.distillation.set_tasks import (
    ControlTask,
    EvaluationTask,
    ResultTask,
    SetSource,
    Shown,
    pictures,
    stored_set,
)
from stillhouse.distillation.spec import ExpertSettings, NetworkSettings
from stillhouse.errors import ArtifactError, DivergedError, ModelError, SpecError
from stillhouse.models.device import peak_bytes
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

FACTORY = NetworkSettings(name="factory", factory=f"{__name__}:dropping", options={"p": 0.0})


def mtt(**changes):
    return Mtt(name="mtt", **TINY | changes)


def run(host, task, on_step=lambda step: None):
    """The steps that were done."""
    done = []

    def tell(kind, content):
        done.append(content["step"])
        on_step(content["step"])

    run_matching(host, task, tell=tell)
    return done


def test_a_tasks_peak_memory_is_its_own(kitchen):
    """Not that of what the process did before."""
    large = torch.ones(400 << 20, dtype=torch.uint8)
    before = peak_bytes(torch.device("cpu"))
    del large
    task = matching(kitchen, mtt(seed=5))
    run(kitchen, task)
    assert all(r.info["peak_bytes"] < before - (300 << 20) for r in sets(kitchen.store, task))


class Killed(Exception):
    pass


def test_images_are_kept_as_they_are_split(kitchen):
    manifest, prepared = kitchen.store.get_manifest("images", IMAGES.images), kitchen.prepared
    assert [part.num_rows for part in manifest.parts] == [199, 143, 359]
    assert manifest.totals["class_names"] == [str(digit) for digit in range(10)]
    assert prepared.train.shape == (199, 1, 8, 8)
    assert manifest.totals["least_per_class"] == int(torch.bincount(prepared.train_labels).min())


def test_every_dead_letter_is_listed_in_a_file_of_the_artifact(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray(np.full((4, 4), i, np.uint8))
            image.save(tmp_path / "data" / name / f"{i}.png")
    for i in range(120):
        (tmp_path / "data" / "b" / f"bad{i}.jpg").write_bytes(b"hello")
    store = Store(str(tmp_path / "store"))
    data = ImageData(path=str(tmp_path / "data"), max_bad_rows=0.99)
    do(host_of(tmp_path / "store"), ImagesTask(IMAGES, data))
    made = store.get_manifest("images", IMAGES.images)
    assert made.totals["dead_letters"] == 120
    listed = read_table(store.path("images", IMAGES.images, DEAD_LETTERS)).to_pylist()
    assert {row["file"] for row in listed} == {f"b/bad{i}.jpg" for i in range(120)}
    assert list(made.files) == [DEAD_LETTERS]


@pytest.mark.parametrize(
    "method",
    [mtt(), Ast(name="ast", **TINY, image_rate=1.0), Datm(name="datm", **TINY)],
    ids=lambda method: method.name,
)
def test_killed_distillation_goes_on_to_the_same_bytes(kitchen, tmp_path, method):
    task = matching(kitchen, method)
    run(kitchen, task)
    assert len(sets(kitchen.store, task)) == 3

    def die(step):
        if step == 3:
            raise Killed

    again = elsewhere(kitchen, tmp_path)
    with pytest.raises(Killed):
        run(again, task, die)
    assert len(sets(again.store, task)) == 2
    run(again, task)
    assert part_bytes(again.store, task) == part_bytes(kitchen.store, task)
    assert [len(r.info["losses"]) for r in sets(again.store, task)] == [0, 2, 2]


@pytest.mark.parametrize("iteration", [0, 2, 4])
@pytest.mark.parametrize("kind", ["parts", "receipts"])
def test_sets_that_were_deleted_are_made_again(kitchen, tmp_path, kind, iteration):
    host, task = elsewhere(kitchen, tmp_path), matching(kitchen, mtt())
    run(host, task)
    before, folder = part_bytes(host.store, task), tmp_path / "distilled" / kind
    (gone,) = folder.glob(f"{task.name_after(iteration)}.*")
    gone.unlink()
    done = run(host, task)
    assert part_bytes(host.store, task) == before
    # from the newest checkpoint before it
    assert done == ([3, 4] if iteration == 4 else [1, 2, 3, 4])


def test_divergence_keeps_the_sets_before_it(kitchen, tmp_path):
    host = elsewhere(kitchen, tmp_path)
    task = matching(kitchen, mtt(num_iterations=60, image_rate=1e38, learning_rate=1.0))
    with pytest.raises(DivergedError, match="image_rate"):
        run(host, task)
    assert len(sets(host.store, task)) == 1


def test_segments_without_a_finite_loss_are_skipped_and_leave_no_loss(kitchen):
    still = expert(0, learning_rate=0.0)
    do(kitchen, still)
    task = matching(kitchen, mtt(max_loss=1.0), experts=[still])
    run(kitchen, task)
    assert [r.info["losses"] for r in sets(kitchen.store, task)] == [[], [], []]
    assert len(set(part_bytes(kitchen.store, task))) == 1  # nothing was changed


def test_experts_of_another_network_are_refused(kitchen):
    task = matching(kitchen, mtt(), network=NetworkSettings(depth=2, width=4))
    with pytest.raises(ArtifactError, match=r"features\.0\.weight is \(3, 1, 3, 3\) there"):
        run(kitchen, task)


def test_a_window_that_leaves_the_stored_epochs_is_refused_before_any_step(kitchen, tmp_path):
    short = expert(2, keep=(0, 2, 3))
    do(kitchen, short)
    task = matching(kitchen, Ast(name="ast", **TINY), experts=[short])
    with pytest.raises(ArtifactError, match=r"holds epochs 0, 2 to 3, not 1: .*max_start_epoch"):
        run(elsewhere(kitchen, tmp_path), task)
    run(kitchen, replace(task, method=mtt(max_start_epoch=1)))


def test_lost_trajectories_and_teachers_are_tasks_to_do_again(tmp_path, kitchen):
    host = elsewhere(kitchen, tmp_path)
    for task in (
        expert(0, keep=(0, 1), epochs=1),
        TeacherTask(IMAGES, TEACHER, Recipe(epochs=1), 0),
    ):
        made = do(host, task)
        (file,) = [tmp_path / part.path for part in made.parts]
        data = file.read_bytes()
        file.unlink()
        assert not host.store.finished(task.KIND, [task.fingerprint])
        assert do(host, task) == made
        assert file.read_bytes() == data


def test_workers_do_not_share_batches_of_a_network_with_batch_norm(kitchen):
    prepared = kitchen.prepared
    with pytest.raises(SpecError, match=r"has batch norm.*`compute.distillers` to 1"):
        require_no_batch_norm(prepared.network(TEACHER, 0), TEACHER.label)
    require_no_batch_norm(prepared.network(NETWORK, 0), NETWORK.label)


def dropping(num_channels, image_size, num_classes, p):
    layers = [nn.Flatten(), nn.Dropout(p), nn.Linear(num_channels * image_size**2, num_classes)]
    return nn.Sequential(*layers)


def test_a_network_that_drops_out_is_no_function_of_its_parameters(kitchen):
    prepared = kitchen.prepared
    with pytest.raises(ModelError, match=r"dropping, p 0.5 drops out at random \(1\)"):
        prepared.flat(FACTORY.model_copy(update={"options": {"p": 0.5}}), 0)
    assert prepared.flat(FACTORY, 0).num_parameters == 650


def test_only_epochs_that_are_read_are_kept():
    experts = ExpertSettings(count=1, epochs=50)
    asked = Mtt(name="mtt", images_per_class=1, min_start_epoch=2, max_start_epoch=5)
    assert asked.epochs_kept(experts) == (2, 3, 4, 5, 6)
    ast = Ast(name="ast", images_per_class=1, max_start_epoch=2)
    assert ast.epochs_kept(experts) == (0, 1, 2, 3, 50)


def test_a_task_is_named_by_what_it_depends_on(kitchen):
    task = matching(kitchen, mtt())
    moved = replace(task, experts=tuple(replace(e, uri="s3://b/x") for e in task.experts))
    assert moved.fingerprint == task.fingerprint
    others = [
        replace(task, given=Preparation(IMAGES.images, True)),
        replace(task, given=replace(IMAGES, code=("0",))),
        replace(task, method=mtt(seed=1)),
        replace(task, groups=("flip",)),
    ]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_evaluation_and_controls(kitchen):
    prepared, store = kitchen.prepared, kitchen.store
    receipt = do(kitchen, ControlTask(IMAGES, "random_real", 20, 0))
    given = stored_set(store, receipt.parts[0])
    assert given.stored.total == 20 * 65
    assert given.labels.tolist() == [label for label in range(10) for _ in range(2)]
    rows = (prepared.train[:, None] - given.images[None, :, :, :]).abs().amax((2, 3, 4))
    assert float(rows.amin(0).max()) < 1e-4  # they are training images

    source = SetSource(receipt.parts[0])
    task = EvaluationTask(IMAGES, source, NETWORK, protocol(), (), "validation", 0)
    losses = []
    for one in (task, replace(task, augmentation=("crop", "scale"))):
        found = one.make(kitchen)
        assert 0 <= found.info["accuracy"] <= 1
        assert one.make(kitchen).info == found.info
        losses.append(found.info["loss"])
    assert losses[0] != losses[1]


def test_result_opens_as_it_was_made_and_in_datasets(kitchen):
    task = matching(kitchen, Datm(name="datm", **TINY, seed=7))
    run(kitchen, task)
    best = sets(kitchen.store, task)[-1]
    shown = Shown(((4, best.parts[0]),), 1)
    result = ResultTask(IMAGES, best.parts[0], None, {}, {}, {"bytes": 1240}, shown)
    part, drawn = do(kitchen, result).parts
    opened = stillhouse.open_distilled(kitchen.store.path("distilled", result.fingerprint))
    assert opened.images.shape == (10, 1, 8, 8)
    assert opened.images.dtype == np.float32
    assert opened.labels.tolist() == list(range(10))
    assert opened.soft_labels.shape == (10, 10)
    assert opened.learning_rate == pytest.approx(best.info["learning_rate"])
    assert opened.preprocessing["mean"] == pytest.approx(kitchen.prepared.standardisation.mean)
    assert opened.num_bytes == 1240
    found = opened.to_datasets()
    assert found[3]["image"].size == (8, 8)
    assert found.features["label"].names == [str(digit) for digit in range(10)]
    values = np.array(found[3]["values"], np.float32).reshape(1, 8, 8)
    header = json.loads(read_table(opened.parts[0].uri).schema.metadata[b"stillhouse"])
    (low, step) = header["ranges"][0]
    assert low + values * step == pytest.approx(opened.images[3], abs=1e-5)

    # the pictures lie beside the artifact
    shown = read_table(kitchen.store.path(drawn.path)).to_pylist()
    delivered = read_table(kitchen.store.path(part.path))["image"].to_pylist()
    assert [row["png"] for row in shown] == [image["bytes"] for image in delivered]


def test_pictures_of_every_class(kitchen):
    task = matching(kitchen, mtt())
    run(kitchen, task)
    points = tuple((i, r.parts[0]) for i, r in enumerate(sets(kitchen.store, task)))
    rows = pictures(kitchen, Shown(points, 3, True)).to_pylist()
    assert {row["point"] for row in rows} == {-1, 0, 1, 2}
    assert all(row["png"].startswith(b"\x89PNG") for row in rows)
    assert sum(row["point"] == -1 for row in rows) == 30
