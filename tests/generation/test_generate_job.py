"""`job: generate` as a whole, with models behind an endpoint on loopback and in the workers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from generation.models import small_model
from generation.servers import KEY, template_server
from pydantic import ValidationError
from result_keys import GENERATE, check_keys
from small import MODEL, Quiet

import stillhouse
from stillhouse.errors import EndpointRefusedError, InputError, SpecError, SpentError
from stillhouse.generation.spec import GenerateSpec
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.chain_spec import ChainSpec
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.report.page import read
from stillhouse.training.spec import TrainSpec

STILLHOUSE = str(Path(sys.executable).parent / "stillhouse")
NUM_SEEDS = 20


@pytest.fixture(scope="module")
def server():
    with template_server() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seeds as JSON Lines."""
    made = tmp_path_factory.mktemp("generate")
    rows = [{"instruction": f"seed {n}", "response": f"answer {n}"} for n in range(NUM_SEEDS)]
    (made / "seeds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def content_of(folder, server, store="store", **changes):
    generation = {"num_pairs": 30, "theta": 3, "num_metadata": 8, "waves": 1}
    models = {
        role: {"endpoint": {"url": server.url, "model": role, "retries": 2}}
        for role in ("strong", "student")
    }
    content = {
        "job": "generate",
        "store": str(folder / store),
        "seeds": {"path": str(folder / "seeds.jsonl")},
        **models,
        "generation": generation | changes.pop("generation", {}),
        "compute": {"generators": 2},
    }
    return content | changes


def parse(folder, server, store="store", **changes):
    return GenerateSpec.model_validate(content_of(folder, server, store, **changes))


def rows_of(result):
    return stillhouse.open_artifact(result["artifacts"]["generated"]).to_datasets()


@pytest.fixture(scope="module")
def made(ray_cluster, folder, server):
    spec = parse(folder, server, prices={"prompt": 2.0, "completion": 8.0})
    planned = plan_job(spec)
    asked = server.asked
    result = run_job(spec, Quiet())
    return result, spec, planned, server.asked - asked


def test_the_result_is_the_contract(made):
    result, spec, planned, asked = made
    check_keys({key: value for key, value in result.items() if key != "price"})
    found = result["generate"]
    assert {*found} >= GENERATE | {"theta", "recovery_ratio", "price"}
    rows = rows_of(result)
    assert found["num_pairs"] == len(rows) == sum(found["rounds"]) > 10
    assert len(found["rounds"]) == 4
    # equal calls of two workers at one time are made twice
    assert found["calls"] == asked and found["calls"] + found["cached_calls"] >= 6 * 30
    of = found["models"].values()
    assert found["tokens"] == sum(m["prompt_tokens"] + m["completion_tokens"] for m in of)
    read_tokens = sum(m["prompt_tokens"] for m in of)
    price = (2 * read_tokens + 8 * (found["tokens"] - read_tokens)) / 1e6
    assert found["price"]["calls"] == pytest.approx(price)
    assert found["price"]["pair"] == pytest.approx(price / len(rows))
    assert len(rows) + sum(found["dropped"].values()) == 30
    assert planned["steps"]["judge 1"]["calls"] == 4 * 30
    assert {*planned["steps"]} >= {"seeds", "encode", "write", "judge 1", "rewrite 2", "judge 4"}
    asked_again = run_job(spec, Quiet())
    assert asked_again["status"] == "nothing_to_do"
    assert asked_again["generate"] == found
    assert plan_job(spec)["status"] == "nothing_to_do"


def test_rows_have_their_history(made):
    result, *_ = made
    for row in rows_of(result):
        assert abs(row["gap"]) > 3
        by = "strong" if row["gap"] > 0 else "student"
        assert row["answered_by"] == by and row["response"].startswith(f"{by} answers")
        assert row["messages"] == [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["response"]},
        ]
        record = json.loads(row["record"])
        assert record["prompts"] == "codec-1" and record["temperature"] == 0.7
        assert record["models"]["student"] == ["endpoint", "student", "", {}]
        assert len(record["history"]) == row["round"] - 1
        assert row["gap"] == row["strong_score"] - row["student_score"]
    names = sorted(Path(result["artifacts"]["generated"]).iterdir())
    assert [path.suffix for path in names] == [".parquet"]  # so that others read the folder
    assert pq.read_table(names[0]).num_rows == result["generate"]["num_pairs"]


def test_the_report(made):
    result, *_ = made
    page = read(result["run"])
    [rounds] = page.find("rounds", "table")
    assert sum(row[3] for row in rounds.rows) == result["generate"]["num_pairs"]
    assert rounds.rows[0][1] <= 30 and page.find("rounds", "histogram")
    assert len(page.find("metadata", "table")) == 2
    assert page.find("examples", "cards")
    [dropped] = page.find("dropped", "table")
    assert dict(map(tuple, dropped.rows)) == result["generate"]["dropped"]
    assert "At the spec's `prices` the calls of endpoints cost" in page.find("cost", "text")[1].text


def test_any_number_of_workers_gives_the_same(made, folder, server):
    result, *_ = made
    for generators in (1, 4):
        spec = parse(folder, server, f"store{generators}", compute={"generators": generators})
        again = run_job(spec, Quiet())
        assert rows_of(again).to_list() == rows_of(result).to_list()
        assert again["generated_fingerprint"] == result["generated_fingerprint"]
        assert again["generate"]["dropped"] == result["generate"]["dropped"]


def test_another_theta_asks_for_nothing_twice(made, folder, server):
    result, *_ = made
    asked = server.asked
    spec = parse(folder, server, generation={"theta": 5, "iterations": 1})
    again = run_job(spec, Quiet())
    assert again["generate"]["calls"] == server.asked - asked == 0
    before = [row for row in rows_of(result) if row["round"] == 1 and abs(row["gap"]) > 5]
    names = {row["instruction"] for row in before}
    assert {row["instruction"] for row in rows_of(again)} == names


def test_a_budget_stops_and_goes_on(made, folder, server):
    result, *_ = made
    asked, calls = server.asked, 60
    with pytest.raises(SpentError, match=r"`budget.calls` is spent: raise it") as error:
        run_job(parse(folder, server, "spent", budget={"calls": calls}), Quiet())
    assert error.value.exit_code == 4
    assert server.asked - asked <= calls
    with pytest.raises(SpentError):
        run_job(parse(folder, server, "spent", budget={"calls": calls}), Quiet())
    assert server.asked - asked <= calls
    with pytest.raises(SpentError, match=r"`budget.tokens` is spent"):
        run_job(parse(folder, server, "spent", budget={"tokens": 10}), Quiet())
    assert server.asked - asked <= calls
    again = run_job(parse(folder, server, "spent", budget={"calls": 10_000}), Quiet())
    assert rows_of(again).to_list() == rows_of(result).to_list()
    assert again["generate"]["calls"] == server.asked - asked


def test_a_killed_run_repeats_nothing_that_was_answered(
    made, ray_cluster, folder, server, tmp_path
):
    """The driver is killed; its workers go with it."""
    result, *_ = made
    server.delay_s, asked = 0.05, server.asked
    path = tmp_path / "spec.yaml"
    compute = {"generators": 2, "address": ray_cluster}
    path.write_text(yaml.safe_dump(content_of(folder, server, "killed", compute=compute)))
    command = [STILLHOUSE, "run", str(path), "--json"]
    try:
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while server.asked < asked + 70:
            assert driver.poll() is None
            time.sleep(0.01)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        server.delay_s = 0.0
    again = json.loads(done.stdout)
    assert again["generated_fingerprint"] == result["generated_fingerprint"]
    in_flight = 2 * 32 * 2  # of two workers, that were answered and not kept
    needed = len({*Path(folder, "killed", "answers").rglob("*.json")})
    assert server.asked - asked <= needed + in_flight


def test_no_secret_is_kept(ray_cluster, folder, server, monkeypatch, tmp_path):
    (tmp_path / "key").write_text(KEY)
    models = {
        role: {"endpoint": {"url": server.url, "model": role, "key_file": str(tmp_path / "key")}}
        for role in ("strong", "student")
    }
    small = {"num_pairs": 4, "iterations": 1, "theta": 0}
    run_job(parse(folder, server, "secret", **models, generation=small), Quiet())
    assert f"Bearer {KEY}" in server.keys
    for path in Path(folder, "secret").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_model_is_trained_on_the_answers(made, folder):
    result, *_ = made
    spec = TrainSpec.model_validate(
        {
            "job": "train",
            "store": str(folder / "store"),
            "data": {"from": result["run"]},
            "tokenizer": {"train": {"vocab_size": 300}},
            "model": {"hidden_size": 32, "num_layers": 1},
            "sequence_length": 64,
            "train": {"num_tokens": 2048, "global_batch": 4},
        }
    )
    trained = run_job(spec, Quiet())
    tokens = stillhouse.open_artifact(trained["artifacts"]["model"]).manifest
    [parts] = [one["parts"] for one in tokens.inputs["data"]["sets"]]
    assert parts and trained["train"]["num_tokens"] == 2048
    [tokens] = Path(folder, "store", "tokens", "parts").glob("*.parquet")
    table = pq.read_table(tokens)
    share = sum(map(sum, table["loss_mask"].to_pylist())) / (64 * table.num_rows)
    assert 0.1 < share < 0.6


def test_a_chain_generates_selects_and_trains(made, folder, server):
    result, *_ = made
    generate = content_of(folder, server)
    del generate["store"], generate["compute"]
    messages = {"columns": {"messages": "messages"}, "max_bad_rows": 0}
    texts = [{"text": f"strong answers the request number {n} of all"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, texts)))
    content = {
        "job": "chain",
        "store": str(folder / "store"),
        "steps": {
            "pairs": generate,
            "best": {
                "job": "select",
                "pool": {"from": "pairs", **messages},
                "target": {"path": str(folder / "pairs.jsonl"), "heldout": 0.5},
                "tokenizer": {"train": {"vocab_size": 300}},
                "sequence_length": 16,
                "prior": {"model": MODEL, "num_tokens": 128, "global_batch": 4},
                "selection": {"fraction": 0.3},
            },
            "model": {
                "job": "train",
                "data": {"from": "best"},
                "model": MODEL,
                "train": {"num_tokens": 512, "global_batch": 4},
            },
        },
    }
    spec = ChainSpec.model_validate(content)
    fresh = ChainSpec.model_validate(content | {"store": str(folder / "fresh")})
    assert plan_spec(fresh)["steps"]["best: select"]["parts"] is None
    assert plan_spec(spec)["steps"]["best: scan"]["parts"] == 2  # pool and target
    steps = run_spec(spec, Quiet())["chain"]["steps"]
    assert steps["pairs"]["generate"]["num_pairs"] == result["generate"]["num_pairs"]
    assert steps["pairs"]["artifact"] == result["artifacts"]["generated"]
    assert steps["best"]["selection"]["num_sequences"] > 0
    assert steps["model"]["train"]["num_tokens"] == 512
    wrong = {"job": "train", "data": {"from": "best"}, "init": {"from": "pairs"}}
    wrong = content["steps"] | {"model": wrong}
    with pytest.raises(SpecError, match="makes no model"):
        run_spec(ChainSpec.model_validate(content | {"steps": wrong}), Quiet())


def test_models_in_the_workers(ray_cluster, folder, tmp_path):
    """One that answers, whose answers end; seeds without answers."""
    rows = [{"instruction": f"say {n} in some other words, please"} for n in range(12)]
    (tmp_path / "seeds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = small_model(tmp_path / "model")
    content = {
        "job": "generate",
        "store": str(tmp_path / "store"),
        "seeds": str(tmp_path / "seeds.jsonl"),
        "strong": {"path": str(model)},
        "languages": "any",
        "near": 1.0,
        "generation": {"name": "rephrase", "num_pairs": 24, "max_tokens": 48, "temperature": 1.0},
    }
    results = []
    for generators in (1, 3):
        changed = content | {"compute": {"generators": generators}}
        changed["store"] += str(generators)
        results.append(run_job(GenerateSpec.model_validate(changed), Quiet()))
    one, other = (rows_of(result).to_list() for result in results)
    assert one == other and len(one) > 5
    assert all(row["response"] and row["style"] for row in one)
    assert len(one) + sum(results[0]["generate"]["dropped"].values()) == 24


def test_a_judge_by_likelihoods_has_a_model_of_its_own(ray_cluster, folder, server, tmp_path):
    """A student of one name with the strong model's answers would have gaps of 0."""
    model = small_model(tmp_path / "judge")
    judge = {"name": "likelihood", "model": {"path": str(model)}}
    few = {"theta": None, "keep": 0.5, "iterations": 1, "num_pairs": 12}
    result = run_job(parse(folder, server, "likely", judge=judge, generation=few), Quiet())
    rows = rows_of(result).to_list()
    assert 6 <= len(rows) <= 8 and result["generate"]["models"]["judge"]["calls"] == 24
    for row in rows:
        record = json.loads(row["record"])
        assert record["judge"] == ["likelihood", "1"] and record["models"]["judge"][0] == "model"
        assert row["strong_score"] < 0 and row["gap"] == row["strong_score"] - row["student_score"]


@pytest.mark.parametrize("name", ["merge", "prefer", "rephrase"])
def test_the_smaller_generators(ray_cluster, folder, server, name):
    content = content_of(folder, server, "small") | {"generation": {"name": name, "num_pairs": 12}}
    del content["student"]
    spec = GenerateSpec.model_validate(content)
    assert any(step.get("calls") for step in plan_job(spec)["steps"].values())
    result = run_job(spec, Quiet())
    check_keys(result)
    rows = rows_of(result).to_list()
    assert len(rows) == result["generate"]["num_pairs"] and len(rows) > 5
    for row in rows:
        if name == "prefer":  # the smaller text, in both orders
            smaller = "first" if row["first"] < row["second"] else "second"
            assert row["preferred"] == smaller and row["first"][-1] != row["second"][-1]
        elif name == "merge":
            seeds = {f"seeds.jsonl:{n}" for n in range(NUM_SEEDS)}
            assert {row["first"], row["second"]} <= seeds and row["first"] != row["second"]
            assert row["response"].startswith("strong answers")
        else:  # with the seed's own answer
            assert row["response"] == f"answer {row['seed'].rpartition(':')[2]}"
    if name == "prefer":
        assert len(rows) + sum(result["generate"]["dropped"].values()) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": {"keep": 0.5}}, "exactly one of `keep` and `theta`"),
        ({"generation": {"name": "codex"}}, "`codex` is none of codec, rephrase, merge, prefer"),
        ({"generation": {"num_pear": 3}}, "num_pear"),
        ({"student": None}, "compares with a `student`"),
        ({"judge": {"name": "likelihood"}}, "set `judge.model` to one by `path`"),
        ({"strong": {"path": "a", "endpoint": None, "from": "b"}}, "exactly one of `path`"),
        ({"strong": {"endpoint": {"url": "host:8000", "model": "m"}}}, "url"),
        ({"seeds": None}, "seeds"),
        ({"budget": {"calls": 0}}, "budget.calls"),
        (
            {"strong": {"endpoint": {"url": "http://a/v1", "model": "m", "api_key": "sk-1"}}},
            "api_key",
        ),
    ],
)
def test_specs_that_are_refused(folder, server, changes, message):
    with pytest.raises(ValidationError) as error:
        parse(folder, server, **changes)
    assert message in str(error.value)


def test_seeds_that_cannot_be_used(ray_cluster, folder, server, tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run_job(parse(folder, server, seeds={"path": str(tmp_path / "none.jsonl")}), Quiet())
    (tmp_path / "empty.jsonl").write_text('{"instruction": ""}\n{"instruction": "  "}\n')
    with pytest.raises(InputError, match="`seeds`: 2 of 2 rows cannot be used"):
        run_job(parse(folder, server, seeds={"path": str(tmp_path / "empty.jsonl")}), Quiet())


def test_an_endpoint_that_says_nothing(ray_cluster, folder, server):
    server.silent = True
    try:
        with pytest.raises(InputError, match=r"nothing was kept .* 20 seed without metadata"):
            run_job(parse(folder, server, "silent"), Quiet())
    finally:
        server.silent = False


def test_a_key_that_the_workers_lack(ray_cluster, folder, server):
    models = {"strong": {"endpoint": {"url": server.url, "model": "m", "key_env": "NOWHERE_SET"}}}
    with pytest.raises(EndpointRefusedError, match="NOWHERE_SET is not set"):
        run_job(parse(folder, server, "lacks", **models), Quiet())
