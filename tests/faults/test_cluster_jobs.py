"""All jobs on a head with a token, against S3; a head that is lost in the middle of one."""

import json
import subprocess

import pytest
import yaml
from drivers import KEYS, PATIENCE_S, SECRET, STILLHOUSE, Bench
from heads import TOKEN, clean_environment, free_ports, running_head
from mixing_world import rows_of, with_choices, write_rows
from small import LEARNING, MODEL, small_spec


def submit(folder, environment, url, spec):
    """`submit --follow` of a spec, begun: its process."""
    path = folder / f"{spec['job']}.yaml"
    path.write_text(yaml.safe_dump(spec))
    command = [STILLHOUSE, "submit", str(path), "--address", url, "--json", "--follow"]
    return subprocess.Popen(
        command,
        env=environment | {"RAY_AUTH_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def followed(process):
    """Exit code, what `--json` printed, and the job's output."""
    out, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, json.loads(out), errors


@pytest.fixture
def bucket(job, s3_server, tmp_path):
    """The job's data and models, and a small world for mixing, in a bucket of S3."""
    bench = Bench(job, s3_server, tmp_path)
    name = bench.bucket()
    bench.upload(name, "pool", "target", "tokenizer", "prior", "conditional")
    (tmp_path / "mix").mkdir()
    kinds = enumerate(("good", "other", "noise"))
    arms = [row | {"task": kind} for i, kind in kinds for row in rows_of(kind, 30, i)]
    write_rows(tmp_path / "mix" / "arms.parquet", arms)
    target = with_choices(rows_of("good", 24, 7), "train")
    target += with_choices(rows_of("good", 10, 8), "test")
    write_rows(tmp_path / "mix" / "target.parquet", target)
    for path in (tmp_path / "mix").iterdir():
        bench.s3.upload_file(str(path), name, f"mix/{path.name}")
    return bench, name


def four_jobs(uri):
    """Small specs of all jobs; the training is on what the selection kept."""
    store = {"store": f"{uri}/store"}
    given = {name: {"path": f"{uri}/{name}"} for name in ("tokenizer", "prior", "conditional")}
    data = {
        "pool": {"path": f"{uri}/pool/*.parquet"},
        "target": {"path": f"{uri}/target/*.parquet", "heldout": 0.2},
    }
    learning = {"num_steps": 4, "micro_batch": 4, "accumulation": 2, "evaluate_every": 2}
    return [
        {
            "job": "select",
            **store,
            **data,
            **given,
            "publish": "sea",
            "sequence_length": 32,
            "part_tokens": 8000,
            "selection": {"tau": 4},
        },
        {
            "job": "train",
            **store,
            "data": {"selection": f"{uri}/store#sea"},
            "model": MODEL,
            "train": {"num_tokens": 2560, "eval_points": 1, **LEARNING},
        },
        {
            "job": "mix",
            **store,
            "target": {"path": f"{uri}/mix/target.parquet", "num_shots": 16},
            "auxiliary": {"path": f"{uri}/mix/arms.parquet", "by": "task"},
            "tokenizer": {"train": {"vocab_size": 300}},
            "model": {"kind": "encoder_decoder", "hidden_size": 32, "num_layers": 1},
            "policy": {"name": "uniform"},
            "train": {"optimizer": "adamw", "learning_rate": 1e-3, "patience": None, **learning},
        },
        {
            "job": "distill",
            **store,
            "data": {"dataset": "digits", "num_images": 300},
            "network": {"name": "convnet", "depth": 2, "width": 4},
            "experts": {"count": 2, "epochs": 3, "batch_size": 128},
            "method": {"name": "mtt", "images_per_class": 1, "num_iterations": 2, "num_steps": 2},
            "evaluate": {"seeds": 1, "epochs": 2},
        },
    ]


@pytest.mark.soak
def test_four_jobs_on_s3_behind_a_token(bucket, s3_server, tmp_path):
    bench, name = bucket
    environment = clean_environment(tmp_path) | KEYS | {"AWS_ENDPOINT_URL": s3_server}
    with running_head(environment, tmp_path / "head.log", free_ports(5)) as head:
        for spec in four_jobs(f"s3://{name}"):
            code, found, said = followed(submit(tmp_path, environment, head.url, spec))
            assert (code, found["state"], found["attempt"]) == (0, "SUCCEEDED", 1), said
            assert TOKEN not in said and SECRET not in said
    objects = bench.objects(name)
    results = [json.loads(v) for k, v in objects.items() if k.endswith("result.json")]
    assert {found["job"] for found in results} == {"select", "train", "mix", "distill"}
    for secret in (TOKEN, SECRET):
        assert not [key for key, data in objects.items() if secret.encode() in data]


@pytest.mark.soak
def test_a_lost_head_costs_what_was_in_flight(job, expected, bench, tmp_path):
    """A new head at the same place, the same spec: the rest is done, to the same bytes."""
    store = tmp_path / "store"
    spec = small_spec(job.folder, **job.models, store=str(store), part_tokens=8000)
    environment, ports = clean_environment(tmp_path), free_ports(5)
    with running_head(environment, tmp_path / "head.log", ports) as head:
        process = submit(tmp_path, environment, head.url, spec)
        lines = [process.stderr.readline()]
        while "score prior: " not in lines[-1]:
            assert lines[-1], "".join(lines)
            lines.append(process.stderr.readline())
        head.kill()
        code, _, said = followed(process)
        assert (code, "run the same command again" in said) == (4, True), said
    with running_head(environment, tmp_path / "second.log", ports) as head:
        code, found, said = followed(submit(tmp_path, environment, head.url, spec))
        assert (code, found["state"]) == (0, "SUCCEEDED"), said
    (path,) = store.glob("runs/*/result.json")
    work = json.loads(path.read_text())["work"]["tokens"]
    assert work["reused"] == work["parts"] > 0
    assert bench.contents(str(store)) == expected
