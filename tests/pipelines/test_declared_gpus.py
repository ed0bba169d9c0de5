"""All jobs on a Ray that declares GPUs which are not there, with `device: cpu`.

All that Ray and torch check about placement on GPUs is met, and `compute.device` alone decides
where it is computed and which backend sums.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from generation.models import small_model
from mixing_world import parse as mix_spec
from mixing_world import write_data
from small import LEARNING, MODEL, make_models, make_world, small_spec
from transformers import AutoModelForCausalLM

from stillhouse import open_artifact
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import token_ids

HERE = Path(__file__).parent
GIVEN = ("tokenizer", "prior", "conditional")


@pytest.fixture(scope="module")
def gpu_ray():
    """Runs a spec on the declared GPUs, in a process with a Ray of its own: its result."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (
        tempfile.TemporaryDirectory(prefix="sh-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, str(HERE / "declared_gpus.py")],
            env=kept | {"PYTHONPATH": path, "RAY_TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):

        def run(content):
            print(json.dumps(content), file=process.stdin, flush=True)
            said = json.loads(process.stdout.readline())
            assert "error" not in said, said
            return said["result"]

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pool, a target and models, with the mixing job's data beside them."""
    folder = make_world(tmp_path_factory.mktemp("gpus"), shards=2, per_shard=60)
    make_models(folder)
    (folder / "mix").mkdir()
    write_data(folder / "mix")
    return folder


def on_gpus(gpus, **widths):
    return {"device": "cpu", "gpus_per_worker": gpus, "packers": 1, **widths}


def select_spec(place, compute):
    given = {name: {"path": str(place / name)} for name in GIVEN}
    train = {"model": MODEL, **LEARNING, "num_tokens": 1000}
    store = str(place / f"gpus-{compute.get('gpus_per_worker', 0)}")
    return small_spec(place, **given, train=train, compute=compute, store=store)


def train_spec(place, kept, compute, **changes):
    learning = changes.pop("train", {})
    return {
        "job": "train",
        "store": str(place / "store"),
        "data": {"selection": kept["artifacts"]["selection"]},
        "model": MODEL,
        "train": LEARNING | learning,
        "compute": compute,
    } | changes


def distill_spec(place, compute):
    method = {"name": "mtt", "images_per_class": 2, "num_iterations": 4, "num_steps": 3}
    return {
        "job": "distill",
        "store": str(place / "store"),
        "data": {"dataset": "digits", "num_images": 300},
        "network": {"name": "convnet", "depth": 2, "width": 4},
        "experts": {"count": 3, "epochs": 3, "batch_size": 128},
        "method": method | {"evaluate_every": 2},
        "evaluate": {"seeds": 2, "epochs": 4},
        "compute": compute,
    }


@pytest.fixture(scope="module")
def kept(gpu_ray, place):
    """A selection by scorers that share GPUs, and its target model."""
    return gpu_ray(select_spec(place, on_gpus(0.5, scorers=2, trainers=2)))


def plain_losses(folder, input_ids):
    """Mean losses of sequences, by transformers' own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(input_ids.astype(np.int64))
    with torch.inference_mode():
        log_probs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return -log_probs.gather(-1, ids[:, 1:, None])[..., 0].mean(1).numpy()


def test_select_scores_on_the_cpu(kept, place):
    tokens = open_artifact(kept["artifacts"]["tokens"])
    for name in GIVEN[1:]:
        scores = open_artifact(kept["artifacts"]["scores"][name])
        made_by = scores.manifest.made_by
        assert (made_by["device"], made_by["dtype"]) == ("cpu", "float32")
        for pool, part in zip(tokens.parts, scores.parts, strict=True):
            expected = plain_losses(place / name, token_ids(read_table(pool.uri)))
            found = read_table(part.uri)["value"].to_numpy()
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_train(gpu_ray, place, kept):
    """Ray Data fetches beside workers that hold GPUs and no CPU."""
    result = gpu_ray(train_spec(place, kept, on_gpus(1, trainers=2)))
    steps = kept["selection"]["num_sequences"] // LEARNING["global_batch"]
    assert result["train"]["num_steps"] == steps


def test_classify(gpu_ray, place):
    """A classifier on two workers, and a student of it on one."""
    spec = {
        "job": "train",
        "task": "classify",
        "store": str(place / "store"),
        "data": {"dataset": "digits", "num_images": 100},
        "network": {"name": "convnet", "depth": 2, "width": 4},
        "train": {"num_epochs": 1, "global_batch": 20},
        "compute": on_gpus(1, trainers=2),
    }
    made = gpu_ray(spec)
    assert made["train"]["num_steps"] == 5
    objective = {"name": "kd", "teachers": [{"from": made["run"]}]}
    taught = {"train": spec["train"] | {"objective": objective}, "compute": on_gpus(0.5)}
    assert gpu_ray(spec | taught)["work"]["teacher signals"]["parts"] == 1


def test_online_selection(gpu_ray, place, kept):
    online = {name: {"path": str(place / name)} for name in GIVEN[1:]} | {"tau": 2}
    compute = on_gpus(0.5, scorers=2, trainers=2)
    spec = train_spec(place, kept, compute, train={"select": "online"}, online=online)
    steps = kept["selection"]["num_sequences"] // (2 * LEARNING["global_batch"])
    assert gpu_ray(spec)["train"]["num_steps"] == steps


def test_mix(gpu_ray, place):
    """Its encoder-decoders are measured on tasks by workers that hold GPUs."""
    task = {
        "path": str(place / "mix" / "target.parquet"),
        "name": "ring",
        "where": {"task": "ring"},
    }
    evaluate = {"tasks": [task]}
    spec = mix_spec(place / "mix", compute=on_gpus(1, trainers=2, scorers=2), evaluate=evaluate)
    result = gpu_ray(spec.model_dump(mode="json", by_alias=True))
    found = result["evaluate"]["models"]
    assert [*found] == ["ucb1, seed 0"] and 0 <= found["ucb1, seed 0"]["ring"]["acc"] <= 1
    assert sum(result["mix"]["ucb1"]["seeds"]["0"]["draws"].values()) == 12 * 5


def test_distill(gpu_ray, place):
    """Three experts at once, on two GPUs."""
    result = gpu_ray(distill_spec(place, on_gpus(1, distillers=2, experts=3)))
    assert 0 <= result["distill"]["test_accuracy"]["mean"] <= 1


def test_generate(gpu_ray, place):
    """Generators that hold GPUs host a model; the counter of their calls holds none."""
    seeds = [{"instruction": f"say {n} in some other words, please"} for n in range(40)]
    (place / "seeds.jsonl").write_text("\n".join(map(json.dumps, seeds)))
    spec = {
        "job": "generate",
        "store": str(place / "store"),
        "seeds": {"path": str(place / "seeds.jsonl")},
        "strong": {"path": str(small_model(place / "writer"))},
        "languages": "any",
        "near": 1.0,
        "generation": {"name": "rephrase", "num_pairs": 40, "max_tokens": 48, "temperature": 1.0},
        "compute": on_gpus(1, generators=2),
    }
    found = gpu_ray(spec)["generate"]
    assert found["num_pairs"] > 0 and found["calls"] > 40


@pytest.mark.soak
@pytest.mark.parametrize("gpus", [0.5, 1])
@pytest.mark.parametrize("job", ["select", "train", "online", "mix", "distill"])
def test_all_widths(gpu_ray, place, kept, gpus, job):
    """More actors than GPUs, where a job can do with fewer; else as many as there is room for."""
    width = int(2 / gpus)
    folder = {"store": str(place / f"{job}-{gpus}")}
    if job == "select":
        spec = select_spec(place, on_gpus(gpus, scorers=width + 1, trainers=width + 1))
    elif job == "train":
        spec = train_spec(place, kept, on_gpus(gpus, trainers=width))
    elif job == "online":
        online = {name: {"path": str(place / name)} for name in GIVEN[1:]} | {"tau": 2}
        compute = on_gpus(gpus, scorers=width // 2, trainers=width // 2)
        spec = train_spec(place, kept, compute, train={"select": "online"}, online=online)
    elif job == "mix":
        mix = mix_spec(place / "mix", compute=on_gpus(gpus, trainers=width))
        spec = mix.model_dump(mode="json", by_alias=True)
    else:
        spec = distill_spec(place, on_gpus(gpus, distillers=width, experts=width + 1))
    assert gpu_ray(spec | folder)["status"] == "done"
