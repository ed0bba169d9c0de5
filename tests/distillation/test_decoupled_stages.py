"""The stages of the decoupled methods without Ray: what they store, and what it costs."""

import datasets
import numpy as np
import pytest
import torch
from stages import NONE_SHOWN, TEACHER, recipe

import stillhouse
from stillhouse.distillation.compensators import CompensatedSet
from stillhouse.distillation.decoupled_job import (
    AssemblyTask,
    plan_refinement,
    plan_units,
    run_assembly,
    run_unit,
    unit_images,
)
from stillhouse.distillation.evaluate import named_protocol
from stillhouse.distillation.evaluate_job import EvaluationTask, SetSource, run_evaluation
from stillhouse.distillation.expert_job import (
    TeacherTask,
    load_teacher,
    run_teacher,
)
from stillhouse.distillation.list_columns import flat_values
from stillhouse.distillation.methods import Infer, NrrDd
from stillhouse.distillation.pictures import REAL, Shown, pictures
from stillhouse.distillation.result_job import ResultTask, run_result
from stillhouse.distillation.settings import Recipe
from stillhouse.distillation.spec import EvaluateSettings
from stillhouse.distillation.stored_sets import (
    expanded_set,
    png_bytes,
    read_set,
    set_table,
    with_logits,
)
from stillhouse.jobs.verify import verify
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table


@pytest.fixture(scope="module")
def taught(kitchen):
    store, prepared = kitchen
    short = Recipe(epochs=2)
    run_teacher(store, prepared, TeacherTask("4" * 64, TEACHER, short, 0))
    return load_teacher(store, prepared, TEACHER, "4" * 64)


def test_infer_is_stored_apart_and_priced_so(kitchen, taught):
    store, prepared = kitchen
    method = Infer(name="infer", images_per_class=2, iterations=2)
    units = plan_units("3" * 64, method, 1, 10)
    assert [(u.teacher, u.unit) for u in units] == [(0, 0)]  # floor(2 / (1 + 1/10)) = 1
    paths = tuple(run_unit(store, prepared, [taught], u).parts[0].path for u in units)
    made = run_assembly(store, prepared, [taught], AssemblyTask("3" * 64, method, recipe(), paths))
    assert made.info["stored"] == [10 * 64 + 64, 20 * 10 * 2]
    given = read_set(read_table(store.path(made.parts[0].path)), "here")
    assert given.images.shape == (20, 1, 8, 8)
    assert given.label_logits.shape == (20, 10)

    totals = {"image_bytes": 11 * 64, "bytes": 11 * 64 + 20 * 10 * 2}
    run_result(
        store, prepared, ResultTask("a" * 64, made.parts[0].path, None, {}, {}, totals, NONE_SHOWN)
    )
    opened = stillhouse.open_distilled(store.path("distilled", "a" * 64))
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


def test_rows_of_infer_are_read_by_datasets(kitchen, tmp_path):
    _, prepared = kitchen
    store = Store(str(tmp_path))
    real = torch.zeros(1, 10, 1, 8, 8, dtype=torch.uint8)
    apart = CompensatedSet(real, torch.ones(2, 1, 1, 8, 8, dtype=torch.int8))
    norm, path = prepared.standardisation, "distilled/parts/one.parquet"
    given = with_logits(expanded_set(apart, norm.mean, norm.std), torch.zeros(30, 10))
    store.put_part(path, set_table(given), num_tokens=0)
    task = ResultTask("e" * 64, path, None, {}, {}, {"bytes": 1}, NONE_SHOWN)
    run_result(store, prepared, task)
    files = store.path("distilled", "e" * 64, "part-*.parquet")
    found = datasets.load_dataset("parquet", data_files=files, split="train")
    assert len(found) == 12
    assert found.features["label"].names == [str(digit) for digit in range(10)]
    assert (found[9]["label"], found[9]["compensator"]) == (9, None)
    assert (found[10]["label"], found[10]["values"]) == (None, None)
    assert np.array(found[9]["label_logits"]).shape == (3, 10)
    assert found[11]["compensator"] == [1] * 64
    assert found[9]["image"].getpixel((0, 0)) == 0
    assert found[11]["image"].getpixel((0, 0)) == 129


def test_nrr_dd_stores_two_distances_a_view(kitchen, taught):
    store, prepared = kitchen
    method = NrrDd(name="nrr_dd", images_per_class=1, iterations=2, num_candidates=5)
    short = EvaluateSettings(epochs=3)
    protocol = named_protocol("p3", short, images_per_class=1, num_classes=10, flips=False)
    assert not protocol.recipe.views.flip
    starts = [run_unit(store, prepared, [taught], u) for u in plan_units("2" * 64, method, 1, 10)]
    units = plan_refinement("2" * 64, method, 10, [r.parts[0].path for r in starts])
    paths = tuple(run_unit(store, prepared, [taught], u).parts[0].path for u in units)
    made = run_assembly(store, prepared, [taught], AssemblyTask("2" * 64, method, protocol, paths))
    assert made.info["stored"] == [640, 10 + 3 * 10 * 2 * 2]
    first = [r.parts[0].path for r in starts]
    shown = Shown(((2, made.parts[0].path),), 10, real=True, starts=tuple(first))
    rows = pictures(store, prepared, shown).to_pylist()
    assert [(row["point"], row["label"]) for row in rows] == [
        (point, label) for point in (REAL, 2) for label in range(10)
    ]
    patch = prepared.pixels(unit_images(store, first[4], prepared.shape))
    assert rows[4]["png"] == png_bytes(patch)[0]
    source = SetSource(made.parts[0].path, made.info["label_path"], "distances")
    task = EvaluationTask("0" * 64, source, TEACHER, protocol, (), "validation", 0)
    assert 0 <= run_evaluation(store, prepared, task).info["accuracy"] <= 1
