"""The result and report of a distillation, from accuracies and pictures written out here."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stillhouse.distillation.methods.mtt import Mtt
from stillhouse.distillation.methods.rded import Rded
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.stored_sets import StoredBytes
from stillhouse.pipelines import evaluation
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.distill import DistillRun, MadeSets, Pictures, SetSnapshot
from stillhouse.pipelines.distill_result import (
    distill_result,
    num_skipped,
    other_sets,
    smoothed,
)
from stillhouse.report.page import render
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import PartRef, Store

NETWORK = {"name": "convnet", "depth": 2, "width": 4}
METHODS = {
    "mtt": {"network": NETWORK, "method": {"num_iterations": 40, "num_steps": 3}},
    "rded": {"network": NETWORK | {"norm": "batch"}, "teachers": [NETWORK | {"norm": "batch"}]},
    "infer": {"network": NETWORK | {"norm": "batch"}, "teachers": [NETWORK | {"norm": "batch"}]},
}


def accuracies(*values):
    return evaluation.Tested(values)


@pytest.fixture
def result_of(tmp_path):
    """A job of two classes in an empty store."""

    def build(method="mtt", images_per_class=2, shown=2, num_images=4, chosen=1, **changes):
        settings = METHODS[method]
        named = {"name": method, "images_per_class": images_per_class}
        spec = DistillSpec.model_validate(
            {"job": "distill", "store": str(tmp_path), "data": {"dataset": "digits"}}
            | settings
            | {"method": settings.get("method", {}) | named}
        )
        part = PartRef("p", num_images, 0, 1, "0" * 64)
        points = [
            SetSnapshot(0, part, (), None, 3.0, (0.5, 0.6)),
            SetSnapshot(40, part, (5.0, 4.0), None, 3.0, (0.6, 0.8)),
        ]
        points = points if method == "mtt" else points[1:]
        names = ["<script>", "cat"]
        totals = {"class_names": names, "shape": (1, 8, 8), "dead_letters": 0}
        images = SimpleNamespace(
            totals=totals, parts=[SimpleNamespace(num_rows=1295)], fingerprint="a" * 64, files={}
        )
        tests = {"a": accuracies(0.6, 0.7), "b <i>": accuracies(0.5, 0.7)}
        controls = [
            evaluation.Control(
                "random_real",
                None,
                650,
                images_per_class,
                {"a": accuracies(0.5, 0.4), "b <i>": accuracies(0.3)},
            )
        ]
        made = DistillRun(
            images,
            SimpleNamespace(),
            MadeSets(tuple(points), ("e" * 64,)),
            len(points) - 1 and chosen,
            StoredBytes(652, 10),
            tests,
            controls,
        )
        made = replace(made, **changes)
        png = {label: [b"\x89PNG"] * shown for label in range(2)}
        pictures = Pictures(png, png, {one.iteration: png for one in points})
        ctx = Context(Store(str(tmp_path)), ComputeSettings(), SimpleNamespace())
        manifest = SimpleNamespace(fingerprint="d" * 64)
        return distill_result(ctx, spec, made, (manifest, pictures), f"{tmp_path}/runs/own")

    return build


def said(result, section, kind="text"):
    return result.find(section, kind)[0].text


def test_accuracies_are_means_and_deviations_over_the_seeds(result_of):
    result = result_of()
    (methods,) = result.find("methods", "table")
    deviation = pytest.approx(0.005**0.5)
    mean, other = pytest.approx(0.65), pytest.approx(0.45)
    assert methods.rows == [
        ["MTT", [None, mean], 2, 662, [mean, deviation], 3.0],
        ["random real", [other, None], 2, 650, [other, deviation], None],
    ]
    (networks,) = result.find("networks", "table")
    assert [[row[0], row[1][0], row[2][0]] for row in networks.rows] == [
        ["a", pytest.approx(0.65), pytest.approx(0.45)],
        ["b <i>", pytest.approx(0.6), 0.3],
    ]
    assert "beside the same baselines" in said(result, "networks")
    assert result.numbers["distill"]["test_accuracy"]["mean"] == pytest.approx(0.65)
    page = render(result)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_matching_page_says_what_its_loss_means(result_of):
    result = result_of()
    losses, accuracy = result.find("progress", "curves")
    assert losses.caption.startswith("Matching loss: 1 is no progress")
    assert accuracy.curves == {"synthetic": [[(0.0, 0.5), (40.0, 0.6)], [(0.0, 0.6), (40.0, 0.8)]]}
    assert "made with convnet" in said(result, "networks")
    assert "1,295 images became **4**." in said(result, "lead")
    assert "they began as beneath." in said(result, "images")
    assert [row.main for row in result.find("change", "images")[0].rows] == [False, True]


def test_a_decoupled_page_names_its_teachers_and_no_matching_loss(result_of):
    result = result_of("infer", num_images=9)
    (losses,) = result.find("progress", "curves")
    assert losses.caption.startswith("Loss of the first of the units")
    assert "taught by convnet" in said(result, "networks")
    assert "became **9**, in the space of 4." in said(result, "lead")
    assert "of the class beneath; the first 2 of each class" in said(result, "images")
    assert result.find("change", "images") == []


def test_one_image_a_class_says_what_stands_beside_it(result_of):
    result = result_of(images_per_class=1, shown=1, num_images=2)
    assert "what 40 updates made of it." in said(result, "images")
    (images,) = result.find("images", "images")
    assert images.style == "pairs" and all(len(row.beside) == 1 for row in images.rows)
    said_of = said(result_of("rded", images_per_class=1, shown=1, num_images=2), "images")
    assert "Small, a real image of each class; large, the one that was made." in said_of


def test_what_is_warned_of(result_of):
    assert result_of().numbers["warnings"] == []
    kept = result_of(chosen=0).numbers["warnings"]
    assert kept == ["No set along the way was better than the images it started from."]
    worse = result_of(tests={"a": accuracies(0.4, 0.4)})
    (warnings,) = worse.find("health", "warnings")
    assert [one.title for one in warnings.warnings] == ["Real images of equal bytes are as good."]
    assert "random real 0.450; of the synthetic ones 0.400" in warnings.warnings[0].detail


def test_iterations_with_too_large_or_no_loss_are_counted():
    part = PartRef("a", 1, 0, 1, "0")
    losses = ((), (0.5, 1.5), (0.9, 1.0, 2.0))
    snapshots = [SetSnapshot(3 * i, part, found, 0.1, 1.0) for i, found in enumerate(losses)]
    method = Mtt(name="mtt", images_per_class=1, max_loss=1.0)
    assert num_skipped(method, snapshots) == 3  # 1.5, 2.0 and one that was not finite
    assert num_skipped(method.model_copy(update={"max_loss": None}), snapshots) == 0
    assert num_skipped(Rded(name="rded", images_per_class=1), snapshots) == 0


def test_long_losses_are_drawn_as_means_of_stretches():
    assert smoothed([4.0, 2.0]) == [(1.0, 4.0), (2.0, 2.0)]
    many = smoothed([float(i) for i in range(401)])
    assert len(many) == 134 and many[0] == (3.0, 1.0) and many[-1] == (401.0, 399.5)


def test_runs_on_the_same_images_and_network_are_listed_by_images_and_method(tmp_path):
    store = Store(str(tmp_path))

    def write(run, **changes):
        accuracy = {"mean": 0.7, "std": 0.01, "seeds": 3}
        made = {
            "method": "mtt",
            "images_per_class": 1,
            "bytes": 662,
            "judged_by": "p1, 300 epochs",
            "seconds": 50.0,
            "networks": {"convnet-3": accuracy},
        }
        images = store.path("images", changes.pop("images", "a" * 64))
        result = {"job": "distill", "artifacts": {"images": images}, "distill": made | changes}
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))

    assert other_sets(store, "a" * 64, "convnet-3", store.path("runs", "own")) == []
    write("own")
    write("ten", images_per_class=10)
    write("sre2l", method="sre2l")
    write("one")
    write("other-images", images="b" * 64)
    write("other-network", networks={"resnet18": {"mean": 0.9, "std": 0, "seeds": 1}})
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "status.json").write_text("{}")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "result.json").write_text("{")
    found = other_sets(store, "a" * 64, "convnet-3", store.path("runs", "own"))
    assert found == [
        ["MTT", 1, 662, [0.7, 0.01], "p1, 300 epochs", 50.0, "one"],
        ["SRe2L", 1, 662, [0.7, 0.01], "p1, 300 epochs", 50.0, "sre2l"],
        ["MTT", 10, 662, [0.7, 0.01], "p1, 300 epochs", 50.0, "ten"],
    ]


def test_other_sets_stand_beside_this_one(result_of, tmp_path):
    result = result_of()
    assert result.find("others", "table") == []
    numbers = result.numbers | {"run": "x"}
    (tmp_path / "runs" / "other").mkdir(parents=True)
    (tmp_path / "runs" / "other" / "result.json").write_text(json.dumps(numbers))
    (table,) = result_of().find("others", "table")
    assert [row[0] for row in table.rows] == ["MTT, this one", "MTT"]
    judged = result.numbers["distill"]["judged_by"]
    assert re.match(r"p1, \d+ epochs", judged) and [row[4] for row in table.rows] == [judged] * 2
