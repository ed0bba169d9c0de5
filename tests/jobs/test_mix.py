"""`job: mix` on a real Ray: one run with controls, its replays, bad input."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mixing_world import by_task, parse, write_data, write_rows, write_spec
from result_keys import check_keys
from small import Quiet

from stillhouse.errors import InputError, SpecError
from stillhouse.jobs.mix import MixJob
from stillhouse.jobs.run import run_job
from stillhouse.jobs.status import draw_report
from stillhouse.jobs.sweep_outcome import metric_of
from stillhouse.mixing.decisions import log_parts, read_decisions
from stillhouse.pipelines.mix import _Progress
from stillhouse.pipelines.workers import STEP

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
STEPS = 12
ARMS = ["good", "noise", "other", "kept"]
CONTROLS = {"controls": ["target_only", "uniform"], "tokenizer": {"train": {"vocab_size": 300}}}
FIFTY = {"train": {"num_steps": 50, "evaluate_every": 25}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def done(ray_cluster, data):
    return run_job(parse(data, **CONTROLS), Quiet())


def manifest(result, label):
    return json.loads(Path(result["artifacts"]["models"][label]["0"], "manifest.json").read_text())


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
    totals = manifest(done, "ucb1")["totals"]
    [best] = [row for row in totals["curve"] if row["step"] == totals["best_step"]]
    for label in ("validation_nll", "validation_accuracy"):
        assert found["ucb1"][label] == best[label]
    path = "mix.ucb1.seeds.0"
    for metric, tested in (("nll", "heldout_nll"), ("accuracy", "accuracy")):
        assert metric_of(done, f"{path}.validation_{metric}") == (
            best[f"validation_{metric}"],
            found["ucb1"][tested],
        )
    assert metric_of(done, f"{path}.heldout_nll") == (found["ucb1"]["heldout_nll"], None)
    assert done["rows"]["truncated"] == 1
    assert done["rows"]["bad: no value of `task` (`by`)"] == 1
    assert any("1 row of the arms was longer" in warning for warning in done["warnings"])
    page = Path(done["report"]).read_text()
    assert "ucb1" in page and "<script" not in page and page.count("data:image/png") == 1
    assert draw_report(done["run"]) == done["report"]
    again = run_job(parse(data, **CONTROLS), Quiet())
    assert again["status"] == "nothing_to_do" and again["mix"] == done["mix"]
    # the run is a model, a reference and a tokenizer
    run = {"from": done["run"]}
    spec = parse(data, policy={"name": "doremi"} | run, model=run, tokenizer=run)
    resolved = MixJob(spec).spec
    model = done["artifacts"]["models"]["ucb1"]["0"]
    assert resolved.given_paths == {"model": model, "policy": model}
    assert resolved.tokenizer.path == done["artifacts"]["tokenizer"]


def replay(data, done, workers, **changes):
    """By so many workers, beside two arms that cannot be read; compared with the run."""
    (data / "torn.parquet").write_bytes(b"PAR1 no")
    selection = {"selection": str(data / "kept" / "selections" / "kept")}
    bad = [{"path": str(data / "gone")}, {"path": str(data / "torn.parquet")}]
    changes |= {
        "policy": {"name": "replay", "log": done["run"]},
        "store": str(data / f"store{workers}"),
        "compute": {"trainers": workers},
        "auxiliary": [by_task(data), selection, *bad],
        "skip_bad_arms": True,
        "tokenizer": {"path": done["artifacts"]["tokenizer"]},
    }
    result = run_job(parse(data, **changes), Quiet())
    expected = done["mix"]["ucb1"]["seeds"]["0"]
    assert result["mix"]["replay"]["seeds"]["0"]["decisions_sha256"] == expected["decisions_sha256"]
    mine, theirs = (
        manifest(run, label)["totals"]["losses"]
        for run, label in ((result, "replay"), (done, "ucb1"))
    )
    assert mine == [pytest.approx(loss, abs=1e-5) for loss in theirs]
    return result


def test_a_replay_has_the_order_and_losses_of_the_run(done, data):
    result = replay(data, done, 1)
    assert result["skipped_arms"].keys() == {"gone", "torn"}
    assert any("2 arms were left out" in warning for warning in result["warnings"])


@pytest.mark.soak
def test_several_workers_replay_fifty_steps(ray_cluster, data):
    fifty = run_job(parse(data, **FIFTY), Quiet())
    for workers in (2, 4):
        replay(data, fifty, workers, **FIFTY)


def test_a_policy_of_the_users(ray_cluster, data):
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
    assert len(manifest(result, "Greedy")["settings"]["policy"]["code"]) == 64


def test_bad_input_is_named_before_any_training(done, data):
    tokenizer = {"path": done["artifacts"]["tokenizer"]}

    def refused(match, error=InputError, **changes):
        given = {"store": str(data / "bad"), "tokenizer": tokenizer} | changes
        with pytest.raises(error, match=match):
            run_job(parse(data, **given), Quiet())

    given = {"path": str(data / "arms.parquet")}
    target = {"path": str(data / "target.parquet")}
    empty = write_rows(data / "empty.parquet", [{"input": "a", "target": " "}])
    lone = write_rows(data / "lone.parquet", [{"input": "a", "choices": ["b"]}])
    broken = data / "broken.parquet"
    broken.write_bytes(b"PAR1 no")
    good = [given | {"name": n, "where": {"task": n}} for n in ("good", "noise")]
    ring = given | {"name": "ring", "where": {"task": "other"}}
    for match, arm in (
        (r"arm `gone`: no files match", {"path": str(data / "gone")}),
        (r"arm `empty`: no usable row .*empty `target`", {"path": empty}),
        (r"arm `broken`: .*skip_bad_arms: true", {"path": str(broken)}),
        (r"`choices` without a column `target`", {"path": lone}),
    ):
        refused(match, auxiliary=[*good, arm])
    for match, arms in (
        (r"several arms of one name: \['good'\]", [*good, good[0]]),
        (r"has 1 arm\(s\) \['good'\]", good[0]),
        (r"the target is among the arms: `target`", [*good, target]),
        (r"value 'ring' of `by: task`", [*good, target | {"by": "task"}]),
        (r"\['ring'\] is a value of `target.where`", [*good, ring]),
    ):
        refused(match, SpecError, auxiliary=arms)
    refused(r"24 rows .* fewer than `target.num_shots` 99", target=target | {"num_shots": 99})
    refused(r"no log of decisions", policy={"name": "replay", "log": str(data / "none")})


def test_progress_after_a_worker_was_lost():
    """It goes back to its checkpoint, the progress does not."""
    told, noted = [], []
    ctx = SimpleNamespace(listener=SimpleNamespace(note=lambda *note: noted.append(note)))
    progress = _Progress(ctx, lambda done, amount: told.append((done, amount)))
    for step in (5, 3, 10):
        progress.take(STEP, {"step": step, "done": 0.0999 * step})
    progress.take("run", {"label": "ucb1", "seed": 0, "step": 0, "done": 1})
    progress.take(STEP, {"step": 25, "done": 1.5})
    assert [amount for _, amount in told] == [5, 5, 0, 15]
    assert round(sum(done for done, _ in told), 2) == 1.5 and len(noted) == 1
