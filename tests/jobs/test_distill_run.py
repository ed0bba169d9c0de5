"""Whole distil jobs on a real Ray: result, reuse, several distillers."""

import json
from pathlib import Path

import pytest
from small import Quiet

import stillhouse
from jobs.plan import plan_job
from jobs.run import run_job
from jobs.status import draw_report
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.stored_sets import read_set
from stillhouse.errors import ArtifactError, InputError
from stillhouse.storage.artifact import read_table

TINY = {
    "job": "distill",
    "data": {"dataset": "digits", "num_images": 300},
    "network": {"name": "convnet", "depth": 2, "width": 4},
    "preprocessing": {"augmentation": ["crop", "scale"]},
    "experts": {"count": 2, "epochs": 3, "batch_size": 128},
    "method": {
        "name": "mtt",
        "images_per_class": 2,
        "num_iterations": 4,
        "num_steps": 3,
        "evaluate_every": 2,
    },
    "evaluate": {"seeds": 2, "epochs": 4, "full": {"epochs": 1}},
    "controls": ["random_real", "full"],
}


def spec(store, **changes):
    return DistillSpec.model_validate({**TINY, "store": str(store), **changes})


@pytest.fixture(scope="module")
def distilled(ray_cluster, tmp_path_factory):
    """Store and result of one whole job."""
    store = tmp_path_factory.mktemp("distilled") / "store"
    return store, run_job(spec(store), Quiet())


def test_result_says_what_was_made(distilled):
    _, result = distilled
    found = result["distill"]
    assert found["method"] == "mtt"
    assert found["images_per_class"] == 2
    assert found["bytes"] == 20 * 64 + 4 + 8 + 20  # 8-bit images, rate, range, labels
    assert found["test_accuracy"]["seeds"] == 2
    assert 0 <= found["validation_accuracy"] <= 1
    random = found["controls"]["random_real"]
    assert random["bytes"] == 20 * 65
    assert found["controls"]["full"]["bytes"] > random["bytes"]
    page = Path(result["report"]).read_text()
    assert page.count("data:image/png;base64,") >= 20 + 20
    assert draw_report(result["run"]) == result["report"]


def test_set_opens_by_its_run(distilled):
    _, result = distilled
    small = stillhouse.open_distilled(result["run"])
    assert small.images.shape == (20, 1, 8, 8)
    assert small.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert small.num_bytes == result["distill"]["bytes"]
    with pytest.raises(ArtifactError, match="made no selection"):
        stillhouse.open_selection(result["run"])


def test_again_does_nothing(distilled):
    store, result = distilled
    again = run_job(spec(store), Quiet())
    assert again["status"] == "nothing_to_do"
    assert again["distilled_fingerprint"] == result["distilled_fingerprint"]
    assert plan_job(spec(store))["status"] == "nothing_to_do"


def test_plan_knows_what_is_there_for_another_method(distilled):
    store, _ = distilled
    other = TINY["method"] | {"name": "tesla"}
    steps = plan_job(spec(store, method=other))["steps"]
    assert steps["experts"]["reused"] == steps["experts"]["parts"] == 2
    assert (steps["distil"]["parts"], steps["distil"]["reused"]) == (3, 0)
    assert steps["evaluate"]["parts"] is None


def last_set(store):
    """The set after the last iteration, chosen or not."""
    for path in (Path(store) / "distilled" / "receipts").glob("*.json"):
        receipt = json.loads(path.read_text())
        if receipt["info"].get("iteration") == 4:
            return read_set(read_table(f"{store}/{receipt['parts'][0]['path']}"), "here")
    raise AssertionError("no receipt of the last point")


def test_two_distillers_learn_what_one_does(distilled, tmp_path):
    store, _ = distilled
    run_job(spec(tmp_path / "store", compute={"distillers": 2}, controls=[]), Quiet())
    one, two = last_set(store), last_set(tmp_path / "store")
    span = float(one.images.max() - one.images.min())
    # 8 bits: a level apart at most, where the sums of two workers differ in their last digits
    assert float((one.images - two.images).abs().max()) <= 1.01 * span / 255
    assert two.learning_rate == pytest.approx(one.learning_rate, rel=1e-5)


def test_too_few_images_are_told_before_any_training(ray_cluster, tmp_path):
    method = TINY["method"] | {"images_per_class": 40}
    listener = Quiet()
    with pytest.raises(InputError, match=r"lower `method\.images_per_class`"):
        run_job(spec(tmp_path / "store", method=method), listener)
    assert [step for step, _, _ in listener.steps] == ["images"]
    (status,) = (tmp_path / "store" / "runs").glob("*/status.json")
    assert json.loads(status.read_text())["state"] == "failed"
