"""What a plan says, and that it leaves no trace."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small import LEARNING, MODEL, digests, parse, rows, small_spec, write_shard

from stillhouse import open_artifact
from stillhouse.distillation.spec import DistillSpec
from stillhouse.jobs.kinds import Estimate, Speeds, cost_row, planned_price, speeds_of
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import StepWork
from stillhouse.spec import ComputeSettings, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import filesystem
from stillhouse.storage.run_record import RunRecord

ALL = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}


def test_of_a_store_that_does_not_exist(world, tmp_path):
    planned = plan_job(parse(world, store=str(tmp_path / "new"), train=ALL))
    assert planned["status"] == "to_do"
    steps = planned["steps"]
    assert steps["scan"] == steps["scan"] | {"parts": 5, "reused": 0}
    assert {"train prior", "score prior", "score conditional", "selection", "train targets"} <= set(
        steps
    )
    assert steps["train prior"]["flops"] > 0
    assert {steps[step]["seconds"] for step in ("scan", "score prior", "train targets")} == {None}
    assert "taken for new, as no run of this store read them" in planned["notes"][0]
    assert "pool-00.parquet" in planned["notes"][0]
    assert list(tmp_path.iterdir()) == []


def test_of_a_finished_job(world, finished, reports, tmp_path):
    before = digests(world / "store")
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(world, train=ALL)))
    code, planned = reports("plan", str(path))
    assert (code, planned["status"], planned["run"]) == (0, "nothing_to_do", finished["run"])
    assert planned["notes"] == ["nothing to do: this spec and these inputs have a finished run"]
    assert all(step["parts"] == step["reused"] for step in planned["steps"].values())
    assert not any(step["seconds"] for step in planned["steps"].values())
    assert digests(world / "store") == before


def test_of_another_tau(world, finished):
    before = digests(world / "store")
    planned = plan_job(parse(world, train=ALL, selection={"tau": 11, "max_share": 0.5}))
    steps = planned["steps"]
    for step in ("tokens", "train prior", "train conditional", "score prior", "score conditional"):
        assert steps[step]["parts"] == steps[step]["reused"] > 0
        assert steps[step]["seconds"] == 0
    assert steps["train targets"]["seconds"] > 0
    assert steps["selection"]["reused"] == 0
    assert digests(world / "store") == before


def flops_of(tokens, passes):
    """By hand, for MODEL with 400 entries (448 are stored) and 32 tokens: gated MLP."""
    inner = 128  # 8/3 of 32, rounded up to a multiple of 64
    layer = 4 * 32 * 32 + 3 * 32 * inner
    return passes * tokens * (2 * layer + 2 * 32 * 32 + 2 * 32 * 448)


@pytest.fixture
def one_more(world):
    """A new shard in the pool, for the length of a test: nothing else may change there."""
    write_shard(world, 9, per_shard=120)
    path = world / "pool" / "pool-09.parquet"
    yield path
    path.unlink()


def test_of_a_new_shard(world, finished, one_more):
    """All that was made stays, pinned models too; what the new shard adds is to do, no more."""
    before = digests(world / "store")
    planned = plan_job(parse(world, train=ALL))
    steps, made = planned["steps"], finished["work"]
    assert planned["status"] == "to_do"
    assert str(one_more) in planned["notes"][0]
    assert "pool-00" not in planned["notes"][0]
    for step in ("tokenizer", "train prior", "train conditional"):
        assert (steps[step]["parts"], steps[step]["reused"], steps[step]["seconds"]) == (1, 1, 0)
        assert steps[step]["flops"] == 0
    units = made["scan"]["parts"]
    assert (steps["scan"]["parts"], steps["scan"]["reused"]) == (units + 1, units)
    assert (steps["tokens"]["parts"], steps["tokens"]["reused"]) == (units + 2, units + 1)
    for step in ("score prior", "score conditional", "contamination"):
        old = made[step]["parts"]  # what ranks the pool scores the held-out target too
        assert (steps[step]["parts"], steps[step]["reused"]) == (old + 1, old)
    tokens = sum(p.num_tokens for p in open_artifact(finished["artifacts"]["tokens"]).parts)
    new = steps["score prior"]["tokens"] - tokens
    assert new == round(one_more.stat().st_size * 2.5 / 3.5)
    assert steps["score prior"]["flops"] == pytest.approx(flops_of(new, 1), rel=1e-3)
    assert steps["score prior"]["seconds"] > 0
    for step in ("selection", "control random", "train targets"):
        assert (steps[step]["parts"], steps[step]["reused"]) == (None, 0)
    assert digests(world / "store") == before


def test_seconds_are_those_of_earlier_runs(tmp_path):
    """Half of the parts were made in 8 busy seconds: 100 FLOPs a second; the newest run counts."""
    store = Store(str(tmp_path))
    for number, flops in enumerate((1, 1600.0)):
        record = RunRecord(store, str(number) * 64)
        record.start("job: select", "select")
        record.step("score prior", parts=4, done=4, reused=2, seconds=6.0)
        record.step("scan", parts=4, done=4, reused=4, seconds=0.1)
        cost = {"flops": {"score prior": flops}, "device_seconds": {"score prior": 8.0}}
        record.put_result({"cost": cost})
        record.finish("done")
        page = Path(record.uri) / "status.json"
        status = json.loads(page.read_text()) | {"updated": f"2026-01-0{number + 1}T00:00:00+00:00"}
        page.write_text(json.dumps(status))
    speeds = speeds_of(store)
    assert speeds.flops == {"score prior": 100.0, "score": 100.0}
    assert speeds.seconds == {"score prior": 3.0}
    compute, work = ComputeSettings(scorers=2), StepWork(parts=4, reused=1)
    row = cost_row("score down", work, Estimate(1000, 250, 7.0, 1), speeds, compute)
    assert row["flops"] == 7 * (750 + 250)
    assert row["seconds"] == 7 * 1000 / 100 / 2
    assert (row["parts"], row["reused"], row["tokens"]) == (5, 1, 1250)
    assert cost_row("scan", work, Estimate(1000), speeds, compute)["seconds"] is None


def test_the_price_of_a_plan():
    """Scoring at 100 FLOPs a busy second on half a GPU; tokens by cores; what is done is free."""
    speeds = Speeds({"score": 100.0}, {}, {"tokens": 6.0, "images": 30.0})
    prices = {"gpu_hour": 3600, "cpu_hour": 7.2}
    compute = {"gpus_per_worker": 0.5, "cpus_per_worker": 2}
    spec = parse(Path("/data"), prices=prices, compute=compute)
    row = {"parts": 4, "reused": 1, "flops": None, "seconds": None}
    rows = {
        "tokens": row,
        "score prior": row | {"flops": 700.0},
        "scan": row | {"reused": 4, "seconds": 0.0},
        "train prior": row | {"parts": None, "reused": 0, "flops": 5.0},
    }
    total, unknown = planned_price(rows, speeds, spec)
    assert total == pytest.approx(3 * 6 * 2 * 7.2 / 3600 + 700 / 100 * 0.5)
    assert unknown == ["train prior"]
    steps = {"set": {"job": "distill", "data": {"dataset": "digits"}}}
    steps["set"] |= {"method": {"name": "rded", "images_per_class": 1}}
    steps["set"] |= {"teachers": [{"name": "resnet18"}]}
    chain = {"job": "chain", "store": "s", "steps": steps, "prices": prices, "compute": compute}
    total, _ = planned_price({"set: images": row}, speeds, parse_spec(chain, "spec.yaml"))
    assert total == 3 * 30 * 0.5


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_no_input_is_read(bucket, proxied, tmp_path, suffix):
    """What plan asks a server for: listings, and of Parquet the footers; not a byte of text."""
    fs, _ = filesystem(f"{bucket}/x")
    found = [row | {"text": row["text"] * 400} for row in rows(3, 60, ["sea"])]
    for name in ("pool", "target"):
        if suffix == "jsonl":
            data = "\n".join(json.dumps(row) for row in found).encode()
        else:
            path = tmp_path / "x.parquet"
            pq.write_table(pa.Table.from_pylist(found), path, compression="none")
            data = path.read_bytes()
        fs.pipe_file(f"{bucket}/{name}/a.{suffix}", data)
        assert len(data) > 1_000_000
    read = []

    def note(_, method, path):
        if method == "GET" and "list-type" not in path and f".{suffix}" in path:
            read.append(path)

    proxied.rule = note
    endpoint = {"endpoint_url": proxied.url}
    content = small_spec(tmp_path, store=f"{bucket}/store", storage_options=endpoint)
    content |= {name: {"path": f"{bucket}/{name}/*.{suffix}"} for name in ("pool", "target")}
    planned = plan_job(SelectSpec.model_validate(content))
    assert planned["status"] == "to_do"
    assert len(read) == (2 if suffix == "parquet" else 0)


def test_of_mixing_and_distilling(tmp_path):
    """Counted by hand from the spec; nothing is there, and no run tells how long it takes."""
    pool = tmp_path / "arms.parquet"
    arms = [{"input": "a b", "target": "c", "task": task} for task in "xyz" for _ in range(8)]
    pq.write_table(pa.Table.from_pylist(arms), pool)
    mix = {
        "job": "mix",
        "store": str(tmp_path / "store"),
        "target": {"path": str(pool), "where": {"task": "x"}, "num_shots": 4},
        "auxiliary": {"path": str(pool), "by": "task", "exclude": ["x"]},
        "tokenizer": {"train": {"vocab_size": 300}},
        "policy": {"name": "uniform"},
        "controls": ["target_only"],
        "seeds": [0, 1],
        "train": {"num_steps": 10, "micro_batch": 4, "accumulation": 3},
    }
    step = plan_job(MixSpec.model_validate(mix))["steps"]["mix"]
    assert (step["parts"], step["reused"], step["seconds"]) == (4, 0, None)
    # uniform: 3 arms' passes a step, ten steps; the control has as many; two seeds
    assert step["gradient_passes"] == 2 * 2 * 10 * 3
    distill = {
        "job": "distill",
        "store": str(tmp_path / "store"),
        "data": {"dataset": "digits", "num_images": 300},
        "network": {"name": "convnet", "depth": 2, "width": 4},
        "experts": {"count": 5, "epochs": 3},
        "method": {"name": "mtt", "images_per_class": 1, "num_iterations": 7},
    }
    steps = plan_job(DistillSpec.model_validate(distill))["steps"]
    assert (steps["experts"]["parts"], steps["experts"]["epochs"]) == (5, 15)
    assert (steps["distil"]["parts"], steps["distil"]["iterations"]) == (None, 7)
    assert not (tmp_path / "store").exists()


def test_of_models_that_are_given(world, finished, given):
    """The digests of the models' files are not remembered either."""
    before = digests(world / "store")
    planned = plan_job(parse(world, **given))
    assert "train prior" not in planned["steps"]
    assert planned["steps"]["score prior"]["reused"] == 0
    assert digests(world / "store") == before
