"""`job: chain` on real Ray, against its steps run one by one by hand."""

import json
from pathlib import Path

import pytest
from small import LEARNING, MODEL, Quiet, make_world

from stillhouse.errors import SpecError, StepFailedError
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.paths import refuse_local_paths, with_absolute_paths
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.verify import verify
from stillhouse.report.page import read

SHORT = {"dtype": "float32", **LEARNING}
BASE = {
    "job": "train",
    "tokenizer": {"train": {"vocab_size": 300}},
    "model": MODEL,
    "sequence_length": 32,
    "train": {"num_tokens": 32 * 8 * 10, **SHORT},
}
CHOOSE = {
    "job": "select",
    "sequence_length": 32,
    "part_tokens": 4000,
    "conditional": {"epochs": 1, **LEARNING},
    "selection": {"tau": 8},
}
TARGET = {"job": "train", "train": {"num_tokens": 32 * 8 * 6, **SHORT}}


def steps_in(folder, base="base", choose="choose"):
    """Three steps; `base` and `choose` are what stands behind `from`."""
    pool = str(folder / "pool" / "*.parquet")
    return {
        "base": BASE | {"data": {"path": pool}},
        "choose": CHOOSE
        | {
            "pool": {"path": pool},
            "target": {"path": str(folder / "target" / "*.parquet"), "heldout": 0.2},
            "tokenizer": {"from": base},
            "prior": {"from": base},
        },
        "target": TARGET | {"init": {"from": base}, "data": {"from": choose}},
    }


def chain_of(folder, steps=None, **changes):
    content = {"job": "chain", "store": str(folder / "store"), "steps": steps or steps_in(folder)}
    content["compute"] = {"scorers": 1, "trainers": 1, "packers": 1}
    return parse_spec(content | changes, "spec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("chain"), shards=2, per_shard=60)


@pytest.fixture(scope="module")
def made(ray_cluster, folder):
    """The chain's result, after a plan of it, which is beside it."""
    planned = plan_spec(chain_of(folder))
    return run_spec(chain_of(folder), Quiet()), planned


def weights(uri):
    return Path(uri, "model.safetensors").read_bytes()


def test_it_makes_what_its_steps_make_one_by_one(made, folder, tmp_path):
    result, _ = made
    steps = result["chain"]["steps"]
    assert [one["status"] for one in steps.values()] == ["done"] * 3
    common = {"store": str(tmp_path), "compute": {"scorers": 1, "trainers": 1, "packers": 1}}
    by_hand = {}
    for name in ("base", "choose", "target"):
        runs = [by_hand[one]["run"] if one in by_hand else "" for one in ("base", "choose")]
        content = steps_in(folder, *runs)[name] | common
        by_hand[name] = run_job(parse_spec(content, name), Quiet())
    for name, key in (("base", "model"), ("target", "model"), ("choose", "selection")):
        mine, theirs = steps[name]["artifact"], by_hand[name]["artifacts"][key]
        assert Path(mine).name == Path(theirs).name
        assert result["artifacts"][name] == mine
        if key == "model":
            assert weights(mine) == weights(theirs)
    assert steps["target"]["train"]["final_loss"] == by_hand["target"]["train"]["final_loss"]
    assert steps["choose"]["selection"] == by_hand["choose"]["selection"]
    assert verify(result["run"], 4)["problems"] == []


def test_again_there_is_nothing_to_do(made, folder):
    result, _ = made
    again = run_spec(chain_of(folder, name="other"), Quiet())
    assert again["status"] == "nothing_to_do" and again["run"] == result["run"]
    assert {one["status"] for one in again["chain"]["steps"].values()} == {"reused"}
    assert plan_spec(chain_of(folder))["status"] == "nothing_to_do"


def test_its_plan_prices_what_waits(made):
    """Before anything was there: by what the other steps are expected to make."""
    result, planned = made
    rows = planned["steps"]
    assert planned["status"] == "to_do" and planned["run"] == result["run"]
    assert "choose: train prior" not in rows
    target = result["chain"]["steps"]["target"]["train"]
    assert rows["target: train"]["tokens"] == target["num_tokens"] == 32 * 8 * 6
    cost = result["cost"]["flops"]["target"]
    assert rows["target: train"]["flops"] == pytest.approx(cost, rel=0.3)
    assert rows["choose: score prior"]["flops"] > 0


def test_the_report_links_the_steps(made):
    report = read(made[0]["run"])
    (lineage,) = report.find("steps", "lineage")
    assert {node.name: node.needs for node in lineage.nodes} == {
        "base": [],
        "choose": ["base"],
        "target": ["base", "choose"],
    }
    page = Path(made[0]["report"])
    for node in lineage.nodes:
        assert (page.parent / node.link).resolve().exists()
        assert f'href="{node.link}"' in page.read_text()


def test_only_what_changed_runs_again(made, folder):
    steps = steps_in(folder)
    steps["choose"] = steps["choose"] | {"selection": {"tau": 4}}
    found = run_spec(chain_of(folder, steps), Quiet())["chain"]["steps"]
    assert [one["status"] for one in found.values()] == ["reused", "done", "done"]


def test_a_step_that_fails(made, folder):
    steps = steps_in(folder)
    steps["target"] = steps["target"] | {"train": TARGET["train"] | {"learning_rate": 1e30}}
    steps["last"] = TARGET | {"init": {"from": "target"}, "data": {"from": "choose"}}
    with pytest.raises(StepFailedError, match=r"step `target`: .*lower `learning_rate`") as failed:
        run_spec(chain_of(folder, steps), Quiet())
    assert failed.value.exit_code == 4
    found = failed.value.details["chain"]["steps"]
    status = {name: one["status"] for name, one in found.items()}
    assert status == {"base": "reused", "choose": "reused", "target": "failed"}


def test_independent_steps_run_side_by_side(ray_cluster, made, folder):
    """By the times in their own records; the cluster has four CPUs."""
    pool = str(folder / "pool" / "*.parquet")
    steps = {
        name: BASE
        | {"data": {"path": pool}, "train": {"num_tokens": 32 * 8 * 60, **SHORT, "seed": i}}
        for i, name in enumerate(("one", "two"))
    }
    found = run_spec(chain_of(folder, steps), Quiet())["chain"]["steps"]
    status = [json.loads(Path(one["run"], "status.json").read_text()) for one in found.values()]
    assert max(one["started"] for one in status) < min(one["ended"] for one in status)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["base"].update(tokenizer={"from": "choose"}), r"next one: .*base -> .*choose"),
        (
            lambda s: s["target"].update(data={"from": "chose"}),
            r"`from: chose` .* no step has this",
        ),
        (lambda s: s["target"].update(data={"from": "base"}), r"`job: train` makes no selection"),
        (lambda s: s["base"].update(job="chain"), r"steps.base`: a chain in a chain"),
        (lambda s: s["base"].update(store="x"), r"steps.base.store`: all steps have that of"),
        (lambda s: s["base"].pop("job"), r"steps.base`: a step is a spec that starts with"),
        (lambda s: s["base"].update(modle={}), r"steps.base: unknown key `modle` .*`model`"),
    ],
)
def test_bad_chains(folder, tmp_path, change, said):
    steps = json.loads(json.dumps(steps_in(folder)))
    change(steps)
    with pytest.raises(SpecError, match=said):
        plan_spec(chain_of(folder, steps, store=str(tmp_path)))
    assert not (tmp_path / "store.json").exists()


def test_a_published_name_is_that_of_a_step(folder):
    with pytest.raises(SpecError, match=r"`publish`: a chain has several results"):
        chain_of(folder, publish="x")


def test_it_can_be_sent(folder, monkeypatch):
    """Paths of all steps are made absolute for this machine, and refused for another one."""
    monkeypatch.chdir(folder)
    steps = steps_in(Path())
    spec = with_absolute_paths(chain_of(folder, steps))
    assert spec.steps["choose"].pool.paths == [str(folder / "pool" / "*.parquet")]
    assert parse_spec(json.loads(json.dumps(_loaded(spec))), "sent") == spec
    with pytest.raises(SpecError, match=r"cannot read local paths: .*`steps.base.data.path: "):
        refuse_local_paths(spec, "it")


def _loaded(spec):
    import yaml

    return yaml.safe_load(spec.to_send())
