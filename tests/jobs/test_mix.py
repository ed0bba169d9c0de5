"""`job: mix` on a real Ray: one run with controls, its replays, bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mixing_world import by_task, parse, write_data, write_rows, write_spec
from result_keys import check_keys
from small import Quiet

from stillhouse.errors import InputError, SpecError
from stillhouse.jobs.mix import list_mix
from stillhouse.jobs.run import run_job
from stillhouse.jobs.status import draw_report
from stillhouse.mixing.decisions import log_parts, read_decisions

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
STEPS = 12
ARMS = ["good", "noise", "other", "kept"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def done(ray_cluster, data):
    changes = {"controls": ["target_only", "uniform"], "tokenizer": {"train": {"vocab_size": 300}}}
    return run_job(parse(data, **changes), Quiet())


def losses(result, label):
    manifest = Path(result["artifacts"]["models"][label]["0"]) / "manifest.json"
    return json.loads(manifest.read_text())["totals"]["losses"]


def test_a_job_mixes_and_reports(done, data):
    check_keys(done)
    found = {label: row["seeds"]["0"] for label, row in done["mix"].items()}
    assert found.keys() == {"ucb1", "target_only", "uniform"}
    # 12 steps of 5 + 2 passes, and the initial one: 2 batches of each arm, 2 of the target
    assert found["ucb1"]["gradient_passes"] == STEPS * 7 + 10
    assert found["target_only"]["gradient_passes"] == found["uniform"]["gradient_passes"] == 91
    assert found["ucb1"]["draws"].keys() == {*ARMS}
    assert sum(found["ucb1"]["draws"].values()) == STEPS * 5
    decisions, arms = read_decisions(log_parts(done["artifacts"]["decisions"]["ucb1"]["0"]))
    assert arms == ARMS and len(decisions) == STEPS * 5
    assert done["rows"]["truncated"] == 1
    assert done["rows"]["bad: no value of `task` (`by`)"] == 1
    assert any("1 row of the arms was longer" in warning for warning in done["warnings"])
    page = Path(done["report"]).read_text()
    assert "ucb1" in page and "<script" not in page and page.count("data:image/png") == 1
    assert draw_report(done["run"]) == done["report"]
    changes = {"controls": ["target_only", "uniform"], "tokenizer": {"train": {"vocab_size": 300}}}
    again = run_job(parse(data, **changes), Quiet())
    assert again["status"] == "nothing_to_do" and again["mix"] == done["mix"]


def test_a_run_is_a_model_a_reference_and_a_tokenizer(done, data):
    run = {"from": done["run"]}
    found = list_mix(parse(data, policy={"name": "doremi"} | run, model=run, tokenizer=run))
    model = done["artifacts"]["models"]["ucb1"]["0"]
    assert found.spec.given_paths == {"model": model, "policy": model}
    assert found.spec.tokenizer.path == done["artifacts"]["tokenizer"]


def replay(data, done, workers, log=None, **changes):
    """By so many workers, beside two arms that are not there; compared with the run."""
    (data / "torn.parquet").write_bytes(b"PAR1 no")
    selection = {"selection": str(data / "kept" / "selections" / "kept")}
    bad = [{"path": str(data / "gone")}, {"path": str(data / "torn.parquet")}]
    changes |= {
        "policy": {"name": "replay", "log": log or done["run"]},
        "store": str(data / f"store{workers}"),
        "compute": {"trainers": workers},
        "auxiliary": [by_task(data), selection, *bad],
        "skip_bad_arms": True,
        "tokenizer": {"path": done["artifacts"]["tokenizer"]},
    }
    result = run_job(parse(data, **changes), Quiet())
    wanted = done["mix"]["ucb1"]["seeds"]["0"]
    assert result["mix"]["replay"]["seeds"]["0"]["decisions_sha256"] == wanted["decisions_sha256"]
    for mine, theirs in zip(losses(result, "replay"), losses(done, "ucb1"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    return result


def test_a_replay_has_the_order_and_losses_of_the_run(done, data):
    result = replay(data, done, 1)
    assert result["skipped_arms"].keys() == {"gone", "torn"}
    assert any("2 arms were left out" in warning for warning in result["warnings"])


def test_a_policy_of_the_users_own(ray_cluster, data):
    """One file in the folder that the job is run in; workers find it there too."""
    policy = {"name": "greedy_policy:Greedy", "initial_examples": 8, "floor": 0.05}
    changes = {"policy": policy, "store": str(data / "own"), "train": {"num_steps": 2}}
    path = write_spec(data, "own", compute={"address": ray_cluster}, **changes)
    command = [Path(sys.executable).parent / "stillhouse", "run", path, "--json"]
    done = subprocess.run(command, cwd=EXTEND, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    decisions, _ = read_decisions(log_parts(result["artifacts"]["decisions"]["Greedy"]["0"]))
    first, later = decisions[0].probabilities, decisions[5].probabilities
    assert sum(first) == pytest.approx(1) and max(first) > min(first) and later is None
    manifest = Path(result["artifacts"]["models"]["Greedy"]["0"]) / "manifest.json"
    assert len(json.loads(manifest.read_text())["settings"]["policy"]["code"]) == 64


FIFTY = {"train": {"num_steps": 50, "evaluate_every": 25}}


@pytest.fixture(scope="module")
def fifty(ray_cluster, data):
    return run_job(parse(data, **FIFTY), Quiet())


@pytest.mark.soak
@pytest.mark.parametrize("workers", [2, 4])
def test_several_workers_replay_fifty_steps(fifty, data, workers):
    replay(data, fifty, workers, **FIFTY)


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
    named = given | {"name": "ring", "where": {"task": "other"}}
    bad(r"\['ring'\] is a value of `target.where`", SpecError, auxiliary=[*good, named])
    few = {"path": target["path"], "num_shots": 99}
    bad(r"24 rows .* fewer than `target.num_shots` 99", target=few)
    bad(r"no log of decisions", policy={"name": "replay", "log": str(data / "none")})
