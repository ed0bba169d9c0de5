"""`job: train` with `task: classify` on real Ray: widths, a killed worker, the report, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from result_keys import check_keys
from samples import order_digest
from small import Quiet, make_models
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from workers import ALONE, Killer

from stillhouse.errors import StillhouseError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.status import draw_report
from stillhouse.report.page import read
from stillhouse.training.order import Rows, SampleOrder

NETWORK = {"name": "convnet", "depth": 2, "width": 8}
NUM_IMAGES = 320


def content(store, trainers=1, **changes):
    """300 digits, 20 steps of 32."""
    learning = {"num_epochs": 2, "global_batch": 32, "learning_rate": 3e-3, "eval_points": 2}
    return {
        "job": "train",
        "task": "classify",
        "store": str(store),
        "data": {"dataset": "digits", "num_images": NUM_IMAGES},
        "network": NETWORK,
        "train": learning | changes.pop("train", {}),
        "compute": {"trainers": trainers},
    } | changes


def run(spec, listener=None):
    return run_job(parse_spec(spec, "spec.yaml"), listener or Quiet())


def manifest(result):
    return json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())


def losses(result):
    return [point["loss"] for point in manifest(result)["totals"]["points"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("classify")


@pytest.fixture(scope="module")
def trained(ray_cluster, place):
    """By one worker."""
    return run(content(place / "one"))


def test_the_result_is_the_contract(trained, place):
    found = trained["train"]
    assert (trained["status"], trained["job"], found["task"]) == ("done", "train", "classify")
    check_keys(trained, "classify")
    totals = manifest(trained)["totals"]
    rows = NUM_IMAGES // 32 * 2
    assert (found["num_steps"], found["num_images"]) == (rows, NUM_IMAGES * 2)
    images = json.loads(Path(trained["artifacts"]["images"], "manifest.json").read_text())
    count = images["parts"][0]["num_rows"]  # drawn class by class
    order = SampleOrder([Rows((count,))], global_batch=32, seed=0, lanes=32, window=count)
    assert found["order_sha256"] == order_digest(order, rows)
    assert 0.3 < found["accuracy"] <= 1 and found["restarts"] == 0
    assert found["validation_accuracy"] == totals["evaluations"][-1]["accuracy"]
    json.dumps(trained, allow_nan=False)
    again = run(content(place / "one"))
    assert (again["status"], again["train"]) == ("nothing_to_do", found)
    planned = plan_job(parse_spec(content(place / "new"), "spec.yaml"))
    assert {name: step["parts"] for name, step in planned["steps"].items()} == {
        "images": 1,
        "train": 1,
    }


def test_the_report_shows_it(trained):
    right = read(trained["run"]).find("learning", "curves")[0].curves["validation"][0]
    assert right[-1][1] == pytest.approx(100 * trained["train"]["validation_accuracy"])
    assert "Test accuracy" in Path(draw_report(trained["run"])).read_text()


@pytest.mark.soak
def test_two_workers_have_the_losses_of_one(trained, place):
    found = run(content(place / "two", 2))
    assert found["model_fingerprint"] == trained["model_fingerprint"]
    assert found["train"]["order_sha256"] == trained["train"]["order_sha256"]
    assert losses(found) == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.soak
def test_a_killed_worker_changes_no_byte(trained, place):
    killer = Killer(9, ALONE)
    found = run(content(place / "killed"), killer)
    assert killer.killed and found["train"]["restarts"] == 1
    assert manifest(found)["files"] == manifest(trained)["files"]


def test_a_student_starts_from_it(trained, place):
    """By run; with a fresh head nothing but the head is trained where the rest is frozen."""
    init = {"from": trained["run"], "head": "fresh", "frozen": True}
    spec = content(place / "one", init=init)
    del spec["network"]
    found = run(spec)
    from safetensors.torch import load_file

    first, second = (
        load_file(Path(one["artifacts"]["model"], "weights.safetensors"))
        for one in (trained, found)
    )
    same = {name: bool((first[name] == second[name]).all()) for name in first}
    assert {name for name, equal in same.items() if not equal} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_student_learns_from_it(trained, place):
    """Stored answers are made once, for any objective; live ones are not stored."""
    teachers = [{"from": trained["run"]}]
    kd = run(content(place / "one", train={"objective": {"name": "kd", "teachers": teachers}}))
    assert kd["work"]["teacher signals"] == {"parts": 1, "reused": 0}
    dhkd = run(content(place / "one", train={"objective": {"name": "dhkd", "teachers": teachers}}))
    assert dhkd["work"]["teacher signals"] == {"parts": 1, "reused": 1}
    live = {"name": "kd", "teachers": teachers, "signals": "live"}
    found = run(content(place / "one", train={"objective": live, "augmentation": ["crop"]}))
    assert "teacher signals" not in found["work"]
    assert len({one["model_fingerprint"] for one in (kd, dhkd, found)}) == 3
    shown = {"augmentation": ["crop"], "views": 3}
    stored = run(content(place / "one", train=shown | {"objective": live | {"signals": "stored"}}))
    assert stored["work"]["teacher signals"] == {"parts": 1, "reused": 0}
    answered = run(content(place / "one", train=shown | {"objective": live}))
    assert np.allclose(losses(stored), losses(answered), rtol=1e-3)


def test_a_state_dict_teaches_what_its_run_does(trained, place):
    alone = place / "teacher.safetensors"
    shutil.copy(Path(trained["artifacts"]["model"], "weights.safetensors"), alone)
    given = [{"from": trained["run"]}], [{"path": str(alone), "network": NETWORK}]
    first, second = (
        run(content(place / "one", train={"objective": {"name": "kd", "teachers": teachers}}))
        for teachers in given
    )
    assert losses(first) == losses(second)
    wider = {"path": str(alone), "network": NETWORK | {"width": 16}}
    objective = {"name": "kd", "teachers": [wider]}
    refused(content(place / "one", train={"objective": objective}), "teacher.safetensors", 3)


def write_images(folder, names, side=8, count=6):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_images_without_labels_are_a_second_source(ray_cluster, place):
    """They are read once, into the store, and decide what the training is named."""
    write_images(place / "others", ["anything"], count=40)
    options = {"unlabelled": {"path": str(place / "others")}}
    learning = {"num_epochs": 1, "objective": {"name": "robust", "steps": 1}}
    found = run(content(place / "one", train=learning, **options))
    assert found["work"]["unlabelled images"] == {"parts": 1, "reused": 0}
    assert found["train"]["num_steps"] == round((NUM_IMAGES + 40) / 32)
    table = read(found["run"]).find("data", "table")[0]
    assert ["without labels", 40] in [row[:2] for row in table.rows]
    again = run(content(place / "one", train=learning, **options))
    assert again["status"] == "nothing_to_do"
    write_images(place / "more", ["anything"], count=41)
    other = content(place / "one", train=learning, unlabelled={"path": str(place / "more")})
    planned = plan_job(parse_spec(other, "spec.yaml"))["steps"]
    assert [planned[name]["reused"] for name in ("images", "unlabelled images")] == [1, 0]


def refused(spec, match, code):
    with pytest.raises(StillhouseError, match=match) as found:
        run(spec)
    assert found.value.exit_code == code


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"task": "paint"}, r"`task: paint` is not known; known for `job: train`: language, cl"),
        ({"netwrk": {}}, r"unknown key `netwrk` \(did you mean `network`\?\)"),
        ({"network": {"name": "resnet18"}}, r"`compute\.trainers` above 1 splits batches"),
        ({"train": {"global_batch": 31}}, r"`compute\.trainers` 2 does not divide"),
        ({"train": {"global_batch": 32, "lanes": 3}}, r"`train\.lanes` 3 does not divide"),
        ({"train": {"views": 3}}, r"`train\.views` are drawn by `train\.augmentation`"),
        ({"train": {"z_loss": 0.1}}, r"`train\.z_loss` is of language models"),
        ({"train": {"objective": {"name": "distil"}}}, r"`objective\.name: distil`: one of"),
        ({"train": {"objective": {"name": "kd"}}}, "kd has at least one"),
        ({"train": {"objective": {"name": "bags", "bag_size": 5}}}, "5` does not divide `train.gl"),
        ({"unlabelled": {"path": "/nowhere"}}, "`unlabelled`: cross_entropy reads labels"),
        ({"init": {"path": "x", "head": "keep"}}, "give either `network` or `init`"),
        ({"data": {"path": "/nowhere/images"}}, "/nowhere/images"),
    ],
)
def test_bad_specs_are_refused_by_name(tmp_path, changes, match):
    refused(content(tmp_path, 2, **changes), match, 3 if "data" in changes else 2)


def test_a_network_too_deep_for_the_images(ray_cluster, tmp_path):
    deep = {"name": "convnet", "depth": 9}
    refused(content(tmp_path, network=deep), "cannot be halved 9 times", 2)


def test_a_start_of_other_classes_is_refused(trained, tmp_path):
    write_images(tmp_path / "cats", ["cat", "dog"])
    spec = content(
        tmp_path / "store",
        data={"path": str(tmp_path / "cats")},
        init={"path": trained["artifacts"]["model"]},
        train={"global_batch": 4},
    )
    del spec["network"]
    refused(spec, r"`init` does not know the class 'cat' \(2 of 2 classes", 3)


def write_sky(path, count=60):
    """Few-shot rows whose class is their first word; every third of another task."""
    words = ["sun", "rain", "wind", "snow", "fog"]
    rng = np.random.default_rng(0)
    rows = [
        {
            "task": "sky" if i % 3 else "sea",
            "input": " ".join([words[i % 2], *(words[j] for j in rng.integers(2, 5, 6))]),
            "target": ["dry", "wet"][i % 2],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_weak_language_model_teaches_a_strong_one(ray_cluster, place):
    """Few-shot rows, two models with one tokenizer; the teacher was trained on the sea alone."""
    write_sky(place / "tasks.jsonl")
    (place / "models").mkdir()
    models = make_models(place / "models")
    for name in ("prior", "conditional"):  # each beside its tokenizer
        shutil.copytree(models["tokenizer"]["path"], models[name]["path"], dirs_exist_ok=True)
    data = {"path": str(place / "tasks.jsonl"), "text_column": "input", "label_column": "target"}
    data |= {"length": 16}
    network = {"name": "language_model", "path": models["prior"]["path"]}
    weak = run(
        content(
            place / "texts",
            data=data | {"where": {"task": "sea"}},
            network=network,
            train={"global_batch": 8},
        )
    )
    changes = {"data": data | {"where": {"task": "sky"}}}
    changes["network"] = {"name": "language_model", "path": models["conditional"]["path"]}
    objective = {"name": "weak_to_strong", "teachers": [{"from": weak["run"]}]}
    changes["track"] = {"tensorboard": str(place / "board")}
    changes["prices"] = {"cpu_hour": 36, "gpu_hour": 1e6, "gb_month": 5e6}
    changes["train"] = {"global_batch": 8, "objective": objective}
    one, two = (run(content(place / "texts", trainers, **changes)) for trainers in (1, 2))
    assert np.allclose(losses(one), losses(two), rtol=1e-5)
    assert one["train"]["order_sha256"] == two["train"]["order_sha256"]
    boards = {folder.name.rpartition("-")[2]: folder for folder in (place / "board").iterdir()}
    told = EventAccumulator(str(boards[one["run"].rsplit("/", 1)[-1][:16]]))
    told.Reload()
    assert [e.value for e in told.Scalars("classifier/point/loss")] == pytest.approx(losses(one))
    table = read(one["run"]).find("data", "table")[0]
    assert [*table.columns] == ["Part", "texts", "epochs"]
    price, page = one["price"], Path(draw_report(one["run"])).read_text()
    assert "texts" in page and "the work of this run costs" in page
    assert price["cpu_seconds"] == pytest.approx(sum(one["cost"]["device_seconds"].values()), abs=1)
    assert price["compute"] == pytest.approx(price["cpu_seconds"] / 100)
    made = json.loads(Path(one["artifacts"]["images"], "manifest.json").read_text())["parts"]
    least = sum(part["num_bytes"] for part in made) + 4 * manifest(one)["totals"]["num_parameters"]
    assert price["gpu_seconds"] == 0 and least < price["num_bytes"] < least + 20_000  # and logits
    assert price["storage_month"] == pytest.approx(price["num_bytes"] / 200)
    refused = content(
        place / "texts",
        **changes | {"network": {"name": "language_model", "path": str(place / "models")}},
    )
    with pytest.raises(StillhouseError, match="no tokenizer beside it"):
        run(refused)
