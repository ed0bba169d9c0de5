"""`job: mix` on a real Ray: one run with controls, its replay by two workers, bad input."""

import json
from pathlib import Path

import pytest
import ray
import yaml
from mixing_world import rows_of, with_choices, write_rows
from small import Quiet

from jobs.run import run_job
from jobs.spec_file import load_spec
from jobs.status import draw_report
from stillhouse.errors import InputError, SpecError
from stillhouse.mixing.decision_log import log_parts
from stillhouse.mixing.decisions import read_decisions

STEPS = 50


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    target = with_choices(rows_of("good", 24, 7), "train") + with_choices(
        rows_of("good", 20, 8), "test"
    )
    write_rows(folder / "target.parquet", [r | {"task": "ring"} for r in target])
    arms = [
        r | {"task": kind}
        for i, kind in enumerate(("good", "other", "noise"))
        for r in rows_of(kind, 40, i)
    ]
    write_rows(folder / "arms.parquet", arms)
    return folder


def parse(data, **changes):
    """A spec as a file's: from YAML."""
    content = {
        "job": "mix",
        "store": str(data / "store"),
        "target": {
            "path": str(data / "target.parquet"),
            "where": {"task": "ring"},
            "num_shots": 16,
        },
        "auxiliary": {"path": str(data / "arms.parquet"), "by": "task"},
        "tokenizer": {"train": {"vocab_size": 300}},
        "model": {"kind": "encoder_decoder", "hidden_size": 32, "num_layers": 1},
        "policy": {"name": "ucb1", "reward": "aggregate", "initial_examples": 8},
        "train": {
            "num_steps": STEPS,
            "micro_batch": 4,
            "accumulation": 5,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "evaluate_every": 25,
            "patience": None,
        },
        "max_input_tokens": 32,
        "max_target_tokens": 8,
        "log_every": 5,
    }
    path = data / "spec.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return load_spec(str(path), [])


@pytest.fixture(scope="module")
def done(ray_cluster, data):
    return run_job(parse(data, controls=["target_only", "uniform"]), Quiet())


def losses(result, label):
    manifest = Path(result["artifacts"]["models"][label]["0"]) / "manifest.json"
    return json.loads(manifest.read_text())["totals"]["losses"]


def test_a_job_mixes_and_reports(done, data):
    found = {label: row["seeds"]["0"] for label, row in done["mix"].items()}
    assert found.keys() == {"ucb1", "target_only", "uniform"}
    # 50 steps of 5 + 2 passes, and the initial one: 2 batches of each arm, 2 of the target
    assert found["ucb1"]["gradient_passes"] == STEPS * 7 + 8
    assert found["target_only"]["gradient_passes"] == found["uniform"]["gradient_passes"] == 357
    assert found["ucb1"]["draws"].keys() == {"good", "other", "noise"}
    assert sum(found["ucb1"]["draws"].values()) == STEPS * 5
    decisions, arms = read_decisions(log_parts(done["artifacts"]["decisions"]["ucb1"]["0"]))
    assert arms == ["good", "noise", "other"] and len(decisions) == STEPS * 5
    page = Path(done["report"]).read_text()
    assert "ucb1" in page and "<script" not in page and page.count("data:image/png") == 1
    assert draw_report(done["run"]) == done["report"]
    again = run_job(parse(data, controls=["target_only", "uniform"]), Quiet())
    assert again["status"] == "nothing_to_do" and again["mix"] == done["mix"]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_replay_has_the_order_and_losses_of_the_run(done, data, workers):
    policy = {"name": "replay", "log": done["artifacts"]["decisions"]["ucb1"]["0"]}
    (data / "torn.parquet").write_bytes(b"PAR1 no")
    arms = {"path": str(data / "arms.parquet"), "by": "task"}
    changes = {
        "policy": policy,
        "store": str(data / f"store{workers}"),
        "compute": {"trainers": workers},
        "auxiliary": [arms, {"path": str(data / "gone")}, {"path": str(data / "torn.parquet")}],
        "skip_bad_arms": True,
        "tokenizer": {"path": done["artifacts"]["tokenizer"]},
    }
    result = run_job(parse(data, **changes), Quiet())
    assert result["skipped_arms"].keys() == {"gone", "torn"}
    assert any("2 arms were left out" in warning for warning in result["warnings"])
    wanted = done["mix"]["ucb1"]["seeds"]["0"]
    assert result["mix"]["replay"]["seeds"]["0"]["decisions_sha256"] == wanted["decisions_sha256"]
    for mine, theirs in zip(losses(result, "replay"), losses(done, "ucb1"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


class KillsTheMixer(Quiet):
    """Kills the Mixer actor when the first run is done and the second one is under way."""

    def advance(self, step, done, amount):
        if step == "mix" and not getattr(self, "killed", False):
            self.killed = True
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if actor["name"].startswith("mixer-"):
                    ray.kill(ray.get_actor(**actor), no_restart=False)


def test_a_killed_mixer_decides_the_same_again(done, data):
    listener = KillsTheMixer()
    result = run_job(parse(data, store=str(data / "killed")), listener)
    assert listener.killed
    assert result["mix"]["ucb1"] == done["mix"]["ucb1"]


def test_bad_input_is_named_before_any_training(done, data):
    tokenizer = {"path": done["artifacts"]["tokenizer"]}

    def bad(match, error=InputError, **changes):
        given = {"store": str(data / "bad"), "tokenizer": tokenizer} | changes
        with pytest.raises(error, match=match):
            run_job(parse(data, **given), Quiet())

    given = {"path": str(data / "arms.parquet")}
    empty = write_rows(data / "empty.parquet", [{"input": "a", "target": " "}])
    (data / "broken.parquet").write_bytes(b"PAR1 no")
    lone = write_rows(data / "lone.parquet", [{"input": "a", "choices": ["b"]}])
    good = [given | {"name": n, "where": {"task": n}} for n in ("good", "noise")]
    bad(r"arm `gone`: no files match", auxiliary=[*good, {"path": str(data / "gone")}])
    bad(r"arm `empty`: no usable row .*empty `target`", auxiliary=[*good, {"path": empty}])
    bad(
        r"arm `broken`: .*skip_bad_arms: true",
        auxiliary=[*good, {"path": str(data / "broken.parquet")}],
    )
    bad(r"`choices` without a column `target`", auxiliary=[*good, {"path": lone}])
    bad(r"several arms of one name: \['good'\]", SpecError, auxiliary=[*good, good[0]])
    bad(r"has 1 arm\(s\) \['good'\]", SpecError, auxiliary=good[0])
    target = {"path": str(data / "target.parquet")}
    bad(r"the target is among the arms: `target`", SpecError, auxiliary=[*good, target])
    by = target | {"by": "task"}
    bad(r"value 'ring' of `by: task`", SpecError, auxiliary=[*good, by])
    few = {"path": target["path"], "num_shots": 99}
    bad(r"24 rows .* fewer than `target.num_shots` 99", target=few)
    bad(r"no log of decisions", policy={"name": "replay", "log": str(data / "none")})
