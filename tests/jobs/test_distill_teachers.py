"""`job: distill` under a teacher that exists: a result of `task: classify`, or its state dict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small import CLASSIFY, TEACHER_NETWORK, Quiet

import stillhouse
from stillhouse.errors import StillhouseError
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.verify import verify

DISTILL = {
    "job": "distill",
    "data": CLASSIFY["data"],
    "network": TEACHER_NETWORK,
    "method": {"name": "rded", "images_per_class": 2, "num_candidates": 5},
    "evaluate": {"seeds": 1, "epochs": 2},
}
SRE2L = {"name": "sre2l", "images_per_class": 1, "iterations": 2, "batch_size": 10}


def run(store, content):
    return run_job(parse_spec({"store": str(store), **content}, "spec.yaml"), Quiet())


@pytest.fixture(scope="module")
def chained(ray_cluster, tmp_path_factory):
    """Store, and the results of the steps of a chain: a teacher, and a set made under it."""
    store = tmp_path_factory.mktemp("taught") / "store"
    steps = {"teacher": CLASSIFY, "small": DISTILL | {"teachers": [{"from": "teacher"}]}}
    chain = {"job": "chain", "store": str(store), "steps": steps}
    found = run_spec(parse_spec(chain, "chain.yaml"), Quiet())["chain"]["steps"]
    taught = run(store, steps["small"] | {"teachers": [{"from": found["teacher"]["run"]}]})
    return store, found, taught


def test_a_classifier_of_another_step_is_the_teacher(chained):
    store, steps, result = chained
    assert [one["status"] for one in steps.values()] == ["done", "done"]
    teacher = steps["teacher"]["artifact"]
    assert result["artifacts"]["learned_from"] == [teacher]
    assert steps["small"]["artifact"] == result["artifacts"]["distilled"]
    assert result["work"]["given teachers"]["parts"] == 1 and "teachers" not in result["work"]
    assert [path.name for path in (store / "models").glob("?" * 64)] == [Path(teacher).name]
    assert stillhouse.open_distilled(result["run"]).images.shape == (20, 1, 8, 8)
    assert verify(result["run"], 0)["problems"] == []


def test_its_state_dict_is_the_same_teacher(chained, tmp_path):
    store, steps, result = chained
    weights = Path(steps["teacher"]["artifact"], "weights.safetensors")
    by_folder = run(store, DISTILL | {"teachers": [{"path": str(weights.parent)}]})
    assert by_folder["distilled_fingerprint"] == result["distilled_fingerprint"]
    alone = tmp_path / "teacher.safetensors"
    alone.write_bytes(weights.read_bytes())
    given = {"path": str(alone), "network": TEACHER_NETWORK}
    found = run(store, DISTILL | {"teachers": [given]})
    one, other = (stillhouse.open_distilled(made["run"]) for made in (result, found))
    assert np.array_equal(one.images, other.images)
    assert found["artifacts"]["learned_from"] == [str(alone)]


def test_beside_one_that_the_job_trains(chained):
    """In the order of the spec; with other numbers of standardisation, by pixels."""
    store, steps, _ = chained
    teachers = [TEACHER_NETWORK, {"from": steps["teacher"]["run"]}]
    squeeze = {"optimiser": "sgd", "learning_rate": 0.1, "epochs": 1, "views": {"mix": "none"}}
    content = DISTILL | {"method": SRE2L, "teachers": teachers, "squeeze": squeeze}
    found = run(store, content | {"data": CLASSIFY["data"] | {"num_images": 250}})
    own, given = found["artifacts"]["learned_from"]
    assert given == steps["teacher"]["artifact"] and own != given
    assert found["work"]["teachers"]["parts"] == found["work"]["given teachers"]["parts"] == 1


def refused(store, content, match, code):
    with pytest.raises(StillhouseError, match=match) as found:
        run(store, DISTILL | content)
    assert found.value.exit_code == code


def test_one_that_does_not_fit_is_refused_before_anything_is_made(chained, tmp_path):
    store, steps, _ = chained
    rng = np.random.default_rng(0)
    for name, side in (("cats", 8), ("large", 16)):
        for kind in ("0", "cat"):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(12):
                pixels = rng.integers(0, 255, (side, side), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / kind / f"{i}.png")
    teachers = [TEACHER_NETWORK, {"from": steps["teacher"]["run"]}]
    before = {*store.glob("models/*")}

    def data(name):
        return {"data": {"path": str(tmp_path / name)}, "teachers": teachers}

    refused(store, data("cats"), r"`teachers\.1` does not know the class 'cat' \(1 of 2", 3)
    refused(store, data("large"), r"`teachers\.1` reads images of \(1, 8, 8\)", 3)
    other = tmp_path / "instance"
    shutil.copytree(steps["teacher"]["artifact"], other)
    config = json.loads((other / "config.json").read_text())
    config["network"]["norm"] = "instance"
    (other / "config.json").write_text(json.dumps(config))
    weights = load_file(other / "weights.safetensors")
    learned = {n: x for n, x in weights.items() if n.rsplit(".", 1)[-1] in ("weight", "bias")}
    save_file(learned, other / "weights.safetensors")
    given = {"teachers": [{"path": str(other)}]}
    refused(store, given, r"`teachers\.0` has no batch statistics to match", 2)
    refused(store, {"teachers": [{"path": str(tmp_path)}]}, r"`teachers\.0`: .* no classifier", 3)
    assert {*store.glob("models/*")} == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"teachers": [{"path": "x.safetensors"}]}, r"`teachers\.0`: `network` goes with a `path`"),
        (
            {"teachers": [{"path": "x", "from": "y"}]},
            r"`teachers\.0`: give either `path` or `from`",
        ),
        ({"teachers": [{"netwrk": 1}]}, r"unknown key `teachers\.0\.netwrk`"),
        (
            {"teachers": [{"path": "x.safetensors", "network": {"depth": 2}}]},
            r"`teachers\.0` has no batch statistics to match: give it `norm: batch`",
        ),
        (
            {"teachers": [{"path": "x"}], "squeeze": {"epochs": 3}},
            "`squeeze` trains `teachers`, and all of yours exist",
        ),
    ],
)
def test_bad_specs_are_refused_by_name(tmp_path, changes, match):
    refused(tmp_path, changes, match, 2)
