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
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.matching_task import require_no_batch_norm, run_matching
from stillhouse.distillation.methods.ast import Ast
from stillhouse.distillation.methods.datm import Datm
from stillhouse.distillation.methods.mtt import Mtt
from stillhouse.distillation.prepared import DEAD_LETTERS, ImagesTask, Preparation
from stillhouse.distillation.recipes import Recipe
from stillhouse.distillation.set_tasks import (
    REAL,
    ControlTask,
    EvaluationTask,
    ResultTask,
    SetSource,
    stored_set,
)
from stillhouse.distillation.spec import ExpertSettings
from stillhouse.errors import ArtifactError, DivergedError, ModelError, SpecError
from stillhouse.models.device import peak_bytes
from stillhouse.models.network_settings import NetworkSettings
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


def test_a_tasks_peak_memory_is_its_own(digits_host):
    """Not that of what the process did before."""
    large = torch.ones(400 << 20, dtype=torch.uint8)
    before = peak_bytes(torch.device("cpu"))
    del large
    task = matching(digits_host, mtt(seed=5))
    run(digits_host, task)
    assert all(r.info["peak_bytes"] < before - (300 << 20) for r in sets(digits_host.store, task))


class Killed(Exception):
    pass


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
def test_killed_distillation_goes_on_to_the_same_bytes(digits_host, tmp_path, method):
    task = matching(digits_host, method)
    run(digits_host, task)
    assert len(sets(digits_host.store, task)) == 3

    def die(step):
        if step == 3:
            raise Killed

    again = elsewhere(digits_host, tmp_path)
    with pytest.raises(Killed):
        run(again, task, die)
    assert len(sets(again.store, task)) == 2
    run(again, task)
    assert part_bytes(again.store, task) == part_bytes(digits_host.store, task)
    assert [len(r.info["losses"]) for r in sets(again.store, task)] == [0, 2, 2]


@pytest.mark.parametrize("iteration", [0, 2, 4])
@pytest.mark.parametrize("kind", ["parts", "receipts"])
def test_sets_that_were_deleted_are_made_again(digits_host, tmp_path, kind, iteration):
    host, task = elsewhere(digits_host, tmp_path), matching(digits_host, mtt())
    run(host, task)
    before, folder = part_bytes(host.store, task), tmp_path / "distilled" / kind
    (gone,) = folder.glob(f"{task.name_after(iteration)}.*")
    gone.unlink()
    done = run(host, task)
    assert part_bytes(host.store, task) == before
    # from the newest checkpoint before it
    assert done == ([3, 4] if iteration == 4 else [1, 2, 3, 4])


def test_divergence_keeps_the_sets_before_it(digits_host, tmp_path):
    host = elsewhere(digits_host, tmp_path)
    task = matching(digits_host, mtt(num_iterations=60, image_rate=1e38, learning_rate=1.0))
    with pytest.raises(DivergedError, match="image_rate"):
        run(host, task)
    assert len(sets(host.store, task)) == 1


def test_segments_without_a_finite_loss_are_skipped_and_leave_no_loss(digits_host):
    still = expert(0, learning_rate=0.0)
    do(digits_host, still)
    task = matching(digits_host, mtt(max_loss=1.0), experts=[still])
    run(digits_host, task)
    assert [r.info["losses"] for r in sets(digits_host.store, task)] == [[], [], []]
    assert len(set(part_bytes(digits_host.store, task))) == 1  # nothing was changed


def test_experts_of_another_network_are_refused(digits_host):
    task = matching(digits_host, mtt(), network=NetworkSettings(depth=2, width=4))
    with pytest.raises(ArtifactError, match=r"features\.0\.weight is \(3, 1, 3, 3\) there"):
        run(digits_host, task)


def test_a_window_that_leaves_the_stored_epochs_is_refused_before_any_step(digits_host, tmp_path):
    short = expert(2, keep=(0, 2, 3))
    do(digits_host, short)
    task = matching(digits_host, Ast(name="ast", **TINY), experts=[short])
    with pytest.raises(ArtifactError, match=r"holds epochs 0, 2 to 3, not 1: .*max_start_epoch"):
        run(elsewhere(digits_host, tmp_path), task)
    run(digits_host, replace(task, method=mtt(max_start_epoch=1)))


def test_lost_trajectories_and_teachers_are_tasks_to_do_again(tmp_path, digits_host):
    host = elsewhere(digits_host, tmp_path)
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


def test_workers_do_not_share_batches_of_a_network_with_batch_norm(digits_host):
    prepared = digits_host.prepared
    with pytest.raises(SpecError, match=r"has batch norm.*`compute.distillers` to 1"):
        require_no_batch_norm(prepared.network(TEACHER, 0), TEACHER.label)
    require_no_batch_norm(prepared.network(NETWORK, 0), NETWORK.label)


def dropping(num_channels, image_size, num_classes, p):
    layers = [nn.Flatten(), nn.Dropout(p), nn.Linear(num_channels * image_size**2, num_classes)]
    return nn.Sequential(*layers)


def test_a_network_that_drops_out_is_no_function_of_its_parameters(digits_host):
    prepared = digits_host.prepared
    with pytest.raises(ModelError, match=r"dropping, p 0.5 drops out at random \(1\)"):
        prepared.flat(FACTORY.model_copy(update={"options": {"p": 0.5}}), 0)
    assert prepared.flat(FACTORY, 0).num_parameters == 650


def test_only_epochs_that_are_read_are_kept():
    experts = ExpertSettings(count=1, epochs=50)
    asked = Mtt(name="mtt", images_per_class=1, min_start_epoch=2, max_start_epoch=5)
    assert asked.epochs_kept(experts) == (2, 3, 4, 5, 6)
    ast = Ast(name="ast", images_per_class=1, max_start_epoch=2)
    assert ast.epochs_kept(experts) == (0, 1, 2, 3, 50)


def test_a_task_is_named_by_what_it_depends_on(digits_host):
    task = matching(digits_host, mtt())
    moved = replace(task, experts=tuple(replace(e, uri="s3://b/x") for e in task.experts))
    assert moved.fingerprint == task.fingerprint
    others = [
        replace(task, preparation=Preparation(IMAGES.images, True)),
        replace(task, preparation=replace(IMAGES, code=("0",))),
        replace(task, method=mtt(seed=1)),
        replace(task, groups=("flip",)),
    ]
    assert len({task.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_evaluation_and_controls(digits_host):
    prepared, store = digits_host.prepared, digits_host.store
    receipt = do(digits_host, ControlTask(IMAGES, "random_real", 20, 0))
    given = stored_set(store, receipt.parts[0])
    assert given.stored.total == 20 * 65
    assert given.labels.tolist() == [label for label in range(10) for _ in range(2)]
    rows = (prepared.train[:, None] - given.images[None, :, :, :]).abs().amax((2, 3, 4))
    assert float(rows.amin(0).max()) < 1e-4  # they are training images

    source = SetSource(receipt.parts[0])
    task = EvaluationTask(IMAGES, source, NETWORK, protocol(), (), "validation", 0)
    losses = []
    for one in (task, replace(task, augmentation=("crop", "scale"))):
        found = one.make(digits_host)
        assert 0 <= found.info["accuracy"] <= 1
        assert one.make(digits_host).info == found.info
        losses.append(found.info["loss"])
    assert losses[0] != losses[1]


def test_result_opens_as_it_was_made_and_in_datasets(digits_host):
    task = matching(digits_host, Datm(name="datm", **TINY, seed=7))
    run(digits_host, task)
    best = sets(digits_host.store, task)[-1]
    shown, totals = ((4, best.parts[0]),), {"bytes": 1240}
    result = ResultTask(IMAGES, best.parts[0], None, {}, {}, totals, shown, real=True)
    part, drawn = do(digits_host, result).parts
    opened = stillhouse.open_distilled(digits_host.store.path("distilled", result.fingerprint))
    assert opened.images.shape == (10, 1, 8, 8)
    assert opened.images.dtype == np.float32
    assert opened.labels.tolist() == list(range(10))
    assert opened.soft_labels.shape == (10, 10)
    assert opened.learning_rate == pytest.approx(best.info["learning_rate"])
    assert opened.preprocessing["mean"] == pytest.approx(digits_host.prepared.standardisation.mean)
    assert opened.num_bytes == 1240
    found = opened.to_datasets()
    assert found[3]["image"].size == (8, 8)
    assert found.features["label"].names == [str(digit) for digit in range(10)]
    values = np.array(found[3]["values"], np.float32).reshape(1, 8, 8)
    header = json.loads(read_table(opened.parts[0].uri).schema.metadata[b"stillhouse"])
    (low, step) = header["ranges"][0]
    assert low + values * step == pytest.approx(opened.images[3], abs=1e-5)

    # the pictures lie beside the artifact
    shown = read_table(digits_host.store.path(drawn.path)).to_pylist()
    delivered = read_table(digits_host.store.path(part.path))["image"].to_pylist()
    made = [row["png"] for row in shown if row["point"] == 4]
    assert made == [image["bytes"] for image in delivered]
    assert {row["label"] for row in shown if row["point"] == REAL} == set(range(10))
