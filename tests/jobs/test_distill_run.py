"""A whole distil job on a real Ray: result, reuse, several distillers, verification."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ray.cloudpickle import register_pickle_by_value
from result_keys import check_keys
from small import DIGITS, MTT, Quiet, about

import stillhouse
from stillhouse.distillation.matching_task import GivenExpert, MatchingTask
from stillhouse.distillation.prepared import ImageHostSettings, Preparation
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.stored_sets import read_set
from stillhouse.errors import ArtifactError, InputError, ModelError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.prune import prune_store
from stillhouse.jobs.run import run_job
from stillhouse.jobs.status import draw_report
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.distill import distil
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

register_pickle_by_value(sys.modules[__name__])  # workers do not see this folder

TINY = DIGITS | MTT | {"controls": ["random_real", "full"]}


def spec(store, **changes):
    return DistillSpec.model_validate({**TINY, "store": str(store), **changes})


@pytest.fixture(scope="module")
def distilled(ray_cluster, tmp_path_factory):
    """Store and result of one whole job."""
    store = tmp_path_factory.mktemp("distilled") / "store"
    return store, run_job(spec(store), Quiet())


def test_the_result(distilled):
    _, result = distilled
    check_keys(result)
    found = result["distill"]
    assert found["method"] == "mtt"
    assert found["images_per_class"] == 2
    assert found["bytes"] == 20 * 64 + 4 + 8 + 20  # 8-bit images, rate, range, labels
    assert found["test_accuracy"]["seeds"] == 2
    assert 0 <= found["validation_accuracy"] <= 1
    random = found["controls"]["random_real"]
    assert random["bytes"] == 20 * 65
    assert random["networks"] == {"convnet-2, width 4": random["test_accuracy"]}
    assert found["controls"]["full"]["bytes"] > random["bytes"]
    page = Path(result["report"]).read_text()
    assert page.count("data:image/png;base64,") >= 20 + 20
    assert draw_report(result["run"]) == result["report"]


def test_the_set_opens_by_its_run_and_again_does_nothing(distilled):
    store, result = distilled
    small = stillhouse.open_distilled(result["run"])
    assert small.images.shape == (20, 1, 8, 8)
    assert small.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert small.num_bytes == result["distill"]["bytes"]
    assert small.trained_by["labels"] == "classes"
    assert small.trained_by["augmentation"] == ["crop", "scale"]
    with pytest.raises(ArtifactError, match="made no selection"):
        stillhouse.open_selection(result["run"])
    again = run_job(spec(store), Quiet())
    assert again["status"] == plan_job(spec(store))["status"] == "nothing_to_do"
    assert again["distilled_fingerprint"] == result["distilled_fingerprint"]
    plan = plan_job(spec(store, method=TINY["method"] | {"name": "tesla"}))
    assert plan["notes"][-1] == "exact up to `distil`; behind it nothing is known yet"
    steps = plan["steps"]
    assert steps["distil"]["seconds"] > 0  # as with the other method
    assert [*steps][:2] == ["images", "experts"]
    assert [*steps][-5:] == ["choose", "controls", "tune controls", "evaluate", "result"]
    assert steps["experts"]["reused"] == steps["experts"]["parts"] == 2
    assert (steps["distil"]["parts"], steps["distil"]["reused"]) == (3, 0)
    assert steps["evaluate"]["parts"] is None


def by_two(distilled, folder, make=MatchingTask, **compute):
    """The receipts of a distillation by two workers, of the job's images and experts."""
    store, result = distilled
    for kind in ("images", "trajectories"):
        shutil.copytree(store / kind, folder / kind)
    parsed, artifacts = spec(folder), result["artifacts"]
    names = [Path(uri).name for uri in artifacts["learned_from"]]
    experts = tuple(GivenExpert(n, str(folder / "trajectories" / n)) for n in names)
    given = Preparation(Path(artifacts["images"]).name, False)
    task = make(given, parsed.network, parsed.method, experts, 3, ("crop", "scale"))
    ctx = Context(Store(str(folder)), ComputeSettings(distillers=2, **compute), Quiet())
    return distil(ctx, task, ImageHostSettings(given))


def test_two_distillers_give_the_set_of_one(distilled, tmp_path):
    store, _ = distilled
    receipts = by_two(distilled, tmp_path)
    assert [receipt.info["iteration"] for receipt in receipts] == [0, 2, 4]
    for receipt in receipts:
        two = read_set(read_table(f"{tmp_path}/{receipt.parts[0].path}"), "here")
        one = set_after(receipt.info["iteration"], store)
        span = float(one.images.max() - one.images.min())
        # 8 bits: a level apart at most, where two workers' sums differ in their last digits
        assert float((one.images - two.images).abs().max()) <= 1.01 * span / 255
        assert two.learning_rate == pytest.approx(one.learning_rate, rel=1e-5)


@pytest.mark.soak
def test_pruned_sets_are_made_again_for_another_evaluation(distilled, tmp_path):
    store, _ = distilled
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    before = {path.name: path.read_bytes() for path in (copy / "distilled/parts").iterdir()}
    assert prune_store(str(copy), grace_hours=0, yes=True)["removed"]["distilled"]
    kept = {path.name for path in (copy / "distilled/parts").iterdir()}
    again = run_job(spec(copy, evaluate=TINY["evaluate"] | {"epochs": 3}), Quiet())
    assert again["status"] == "done"
    after = {path.name: path.read_bytes() for path in (copy / "distilled/parts").iterdir()}
    made = {path.stem for path in (copy / "distilled/receipts").iterdir()} & {
        Path(name).stem for name in before.keys() - kept
    }
    assert made and all(after[f"{name}.parquet"] == before[f"{name}.parquet"] for name in made)


class Failing(MatchingTask):
    """Raises an error of its own in one of two workers, when the other waits for it."""

    def name_after(self, iteration):
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 1:
            raise KeyError("in one worker")
        return super().name_after(iteration)


@pytest.mark.soak
def test_an_error_in_one_of_two_distillers_is_reported_as_it_is(distilled, tmp_path):
    with pytest.raises(RuntimeError, match=r"KeyError: 'in one worker' \(.*:\d+\)"):
        by_two(distilled, tmp_path, Failing, max_attempts=1)


def set_after(iteration, store):
    """What the job had then."""
    for path in (store / "distilled" / "receipts").glob("*.json"):
        receipt = json.loads(path.read_text())
        if receipt["info"].get("iteration") == iteration:
            return read_set(read_table(f"{store}/{receipt['parts'][0]['path']}"), "here")
    raise AssertionError(f"no set of iteration {iteration}")


def test_too_few_images_are_refused_before_any_training(distilled):
    store, _ = distilled
    method = TINY["method"] | {"images_per_class": 40}
    listener, before = Quiet(), set(store.glob("runs/*"))
    with pytest.raises(InputError, match=r"class '.' has .*: lower `method\.images_per_class`"):
        run_job(spec(store, method=method), listener)
    assert [step for step, _, _ in listener.steps] == ["images"]
    (run,) = set(store.glob("runs/*")) - before
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.soak
def test_networks_that_cannot_be_built_are_refused_before_any_training(distilled):
    store, _ = distilled
    networks = [TINY["network"], {"depth": 7}]
    listener, before = Quiet(), set(store.glob("trajectories/*"))
    changes = {
        "evaluate": TINY["evaluate"] | {"networks": networks},
        "experts": TINY["experts"] | {"seed": 50},
    }
    with pytest.raises(ModelError, match=r"^`evaluate\.networks\.1`: images of 8 pixels"):
        run_job(spec(store, **changes), listener)
    assert [step for step, _, _ in listener.steps] == ["images", "experts"]
    assert set(store.glob("trajectories/*")) == before


def test_verify_finds_what_was_changed(distilled, reports, tmp_path):
    store, result = distilled
    code, found = reports("verify", result["run"])
    assert (code, found["problems"]) == (0, [])
    assert (found["checked"]["runs"], found["checked"]["images"]) == (1, 20)
    shutil.copytree(store / "distilled", tmp_path / "distilled")
    copy = tmp_path / "distilled" / result["distilled_fingerprint"]
    part = copy / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    gone = about(copy) / "preprocessing.safetensors"
    gone.unlink()
    code, found = reports("verify", str(copy))
    missing, changed = found["problems"]
    assert code == 3
    assert missing.startswith(f"{gone} is missing, ")
    assert changed.startswith(f"{part} has sha256 ")


def test_control_is_no_second_look_at_the_start_images(distilled):
    store, _ = distilled
    start = set_after(0, store)
    listed = [json.loads(p.read_text()) for p in (store / "distilled" / "receipts").glob("*.json")]
    measured = {"seconds", "peak_bytes"}
    paths = [r["parts"][0]["path"] for r in listed if r["parts"] and r["info"].keys() == measured]
    drawn = [read_table(f"{store}/{path}") for path in paths if "/parts/" in path]
    (control,) = [read_set(table, "here") for table in drawn if "values" in table.column_names]
    assert torch.equal(control.labels, start.labels)
    assert not torch.allclose(control.images, start.images, atol=0.1)
