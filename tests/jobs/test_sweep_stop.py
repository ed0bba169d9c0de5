"""`sweep.stop`: what the schedulers answer to made curves, and real trainings that are stopped."""

import pytest
from small import Quiet, make_world, small_training

from stillhouse.errors import SpecError, StoppedEarlyError
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.sweep_record import Decisions
from stillhouse.jobs.sweep_stop import Stopper
from stillhouse.jobs.verify import verify
from stillhouse.report.page import read
from stillhouse.storage.artifact import Store
from stillhouse.storage.run_record import read_json, read_status


def content_of(folder, **changes):
    one_after_another = {"trainers": 1, "packers": 1, "cpus_per_worker": 3}
    content = small_training(folder, 400, compute=one_after_another)
    content["train"]["eval_points"] = 8
    return content | changes


def swept(folder, stop, metric="train.heldout_nll", over=None, **changes):
    over = over or {"train.learning_rate": [1e-2, 1e-6]}
    sweep = {"over": over, "metric": metric, "stop": stop}
    return parse_spec(content_of(folder, **changes) | {"sweep": sweep}, "spec")


def answers(stopper, curves, order):
    """After which evaluation each run was stopped; `order` has the runs, one for an evaluation."""
    at, stopped = dict.fromkeys(curves, 0), {}
    for run in order:
        if run in stopped:
            continue
        at[run] += 1
        content = {"step": 10 * at[run], "num_steps": 80, "nll": curves[run][at[run] - 1]}
        try:
            stopper.on_evaluation(run, content)
        except StoppedEarlyError:
            stopped[run] = at[run]
    return stopped


CURVES = {
    "a": [8.0, 7, 6, 5, 4, 3, 2, 1],
    "b": [9.0, 9, 9, 9, 9, 9, 9, 9],
    "c": [7.0, 6, 5, 4, 3, 2, 1, 0],
    "d": [7.5, 6.8, 6, 6, 6, 6, 6, 6],
}
ONE_BY_ONE = [run for run in CURVES for _ in range(8)]


def test_asha_halves_at_its_rungs(tmp_path):
    """Rungs at 1, 2, 4, 8, and the median of what was seen there: a passes all as the first. b at
    1 has 9 > 8. c at 1 has 7 <= 8, at 2 6 <= 7, at 4 4 <= 5. d at 1 has 7.5 <= 8, the median of
    (8, 9, 7); at 2 6.8 > 6.5, the median of (7, 6)."""
    stop = {"name": "asha", "reduction_factor": 2}
    stopper = Stopper(swept(tmp_path, stop), Store(str(tmp_path)), Decisions(str(tmp_path / "r")))
    assert answers(stopper, CURVES, ONE_BY_ONE) == {"b": 1, "d": 2}


def test_median_of_the_others_means(tmp_path):
    """From the third variant on, after 2 evaluations: c's best is 6, below (6.5, 9)'s median. d's
    best is 6.8 after 2; the others' means of evaluation 2 are 7, 9, 6, of median 7: it goes on.
    After 3: means 6.5, 9, 5.5, d's best is 6. After 4: 6, 9, 5, so 6 is not above 6. After 5:
    5.5, 9, 4.5, and d still has 6: it ends."""
    stop = {"name": "median", "grace_period": 2, "min_samples": 2}
    stopper = Stopper(swept(tmp_path, stop), Store(str(tmp_path)), Decisions(str(tmp_path / "r")))
    assert answers(stopper, CURVES, ONE_BY_ONE) == {"d": 5}


@pytest.mark.parametrize("name", ["asha", "median"])
def test_the_record_makes_a_stopper_that_goes_on_alike(tmp_path, name):
    """Killed after every evaluation; those that are told twice after a kill change nothing."""
    spec, store = swept(tmp_path, {"name": name}), Store(str(tmp_path))
    order = [run for i in range(8) for run in CURVES]  # in turns
    whole = answers(Stopper(spec, store, Decisions(str(tmp_path / "whole"))), CURVES, order)
    assert whole
    at, stopped = dict.fromkeys(CURVES, 0), {}
    for run in order:
        if run in stopped:
            continue
        at[run] += 1
        stopper = Stopper(spec, store, Decisions(str(tmp_path / "killed")))
        for number in {max(1, at[run] - 1), at[run]}:
            content = {"step": 10 * number, "num_steps": 80, "nll": CURVES[run][number - 1]}
            try:
                stopper.on_evaluation(run, content)
            except StoppedEarlyError:
                stopped[run] = number
    assert stopped == whole
    assert {*Decisions(str(tmp_path / "killed")).stopped} == {*whole}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("stop"), shards=1, per_shard=60)


@pytest.fixture(scope="module")
def made(ray_cluster, folder):
    return run_spec(swept(folder, {"name": "asha", "grace_period": 2}), Quiet())


def test_a_hopeless_variant_is_stopped_and_never_chosen(made, folder):
    good, bad = made["sweep"]["variants"]
    assert (good["status"], bad["status"]) == ("done", "stopped")
    assert bad["metric"] is None and bad["stopped_at"]["evaluation"] >= 2
    assert bad["stopped_at"]["step"] == 50 * bad["stopped_at"]["evaluation"]
    test = made["train"]["heldout_halves"]["test"]
    assert made["sweep"]["chosen"] == good | {"test": test} and made["run"] == good["run"]
    assert read_status(bad["run"])["state"] == "stopped"
    assert verify(made["sweep"]["run"], 4)["problems"] == []


def test_a_stopped_variant_cost_its_steps(made, folder):
    """As many FLOPs a step as the one that ran to its end, and the seconds of those steps."""
    good, bad = made["sweep"]["variants"]
    step = bad["stopped_at"]["step"]
    assert bad["flops"] == pytest.approx(good["flops"] * step / 400)
    cost = read_json(made["sweep"]["run"], "result.json")["cost"]
    assert cost["flops"] == {"001": good["flops"], "002": bad["flops"]}
    assert 0 < bad["device_seconds"] == cost["device_seconds"]["002"]


def test_what_stops_a_variant_is_its_validation_half(tmp_path):
    """b is the better one of the whole and of the test half, and the worse one of validation."""
    stop = {"name": "asha", "reduction_factor": 2}
    stopper = Stopper(swept(tmp_path, stop), Store(str(tmp_path)), Decisions(str(tmp_path / "r")))

    def content(whole, validation, test):
        halves = {"validation": {"nll": validation}, "test": {"nll": test}}
        return {"step": 10, "num_steps": 80, "nll": whole, "halves": halves}

    stopper.on_evaluation("a", content(5.0, 2.0, 8.0))
    with pytest.raises(StoppedEarlyError):
        stopper.on_evaluation("b", content(4.0, 3.0, 5.0))


def test_it_stays_stopped(made, folder):
    spec = swept(folder, {"name": "asha", "grace_period": 2})
    assert plan_spec(spec)["status"] == "nothing_to_do"
    again = run_spec(spec, Quiet())
    assert again["status"] == "nothing_to_do" and again["sweep"] == made["sweep"]
    training = content_of(folder)["train"] | {"learning_rate": 1e-6}
    by_hand = run_job(parse_spec(content_of(folder, train=training), "spec"), Quiet())
    assert by_hand["run"] == made["sweep"]["variants"][1]["run"]
    (folder / "store" / "runs" / made["sweep"]["run"].rsplit("/", 1)[-1] / "result.json").unlink()
    anew = run_spec(spec, Quiet())["sweep"]
    assert [one["status"] for one in anew["variants"]] == ["reused", "stopped"]
    assert anew["variants"][1]["stopped_at"] == made["sweep"]["variants"][1]["stopped_at"]


def test_the_report_says_where(made):
    report = read(made["sweep"]["run"])
    (table,) = report.find("variants", "table")
    at = made["sweep"]["variants"][1]["stopped_at"]["evaluation"]
    assert [row[2] for row in table.rows][1] == f"stopped at {at}"
    curves = report.find("variants", "curves")[-1].curves
    assert len(curves["001"][0]) == 8 and len(curves["002"][0]) == at


def test_a_finished_variant_is_what_others_are_compared_with(made, folder):
    """A new sweep, of a rate that is trained already and a hopeless one that is not."""
    over = {"train.learning_rate": [1e-2, 1e-7]}
    found = run_spec(swept(folder, {"name": "asha"}, over=over), Quiet())["sweep"]
    assert [one["status"] for one in found["variants"]] == ["reused", "stopped"]
    evaluations = Decisions(found["run"]).evaluations
    assert [e["evaluation"] for e in evaluations[:8]] == [*range(1, 9)]


@pytest.mark.soak
def test_a_group_of_workers_is_stopped_as_one(made, folder):
    """Its place is free again: the last variant is trained after it."""
    over = {"train.learning_rate": [1e-2, 1e-6, 2e-2]}
    compute = {"trainers": 2, "packers": 1, "cpus_per_worker": 2}
    training = content_of(folder)["train"] | {"seed": 1}
    spec = swept(folder, {"name": "asha"}, over=over, compute=compute, train=training)
    found = run_spec(spec, Quiet())["sweep"]["variants"]
    assert [one["status"] for one in found[:2]] == ["done", "stopped"]
    assert found[2]["status"] in ("done", "stopped")


@pytest.mark.parametrize(
    ("stop", "metric", "changes", "said"),
    [
        ({"name": "asha"}, "train.final_loss", {}, r"`train.final_loss` of `job: train` is known"),
        ({"name": "asha"}, "train.heldout_nll", {"heldout": None}, r"needs `heldout`"),
        ({"name": "pbt"}, "train.heldout_nll", {}, r"`sweep.stop.name`: 'pbt': input should be"),
        ({"name": "asha", "min_samples": 2}, "train.heldout_nll", {}, r"`stop.min_samples` is a"),
        ({"name": "median", "grace_period": 8}, "train.heldout_nll", {}, r"leaves nothing to stop"),
    ],
)
def test_bad_stops(folder, stop, metric, changes, said):
    with pytest.raises(SpecError, match=said):
        swept(folder, stop, metric, **changes)


def test_only_trainings_have_curves(folder):
    content = {
        "job": "select",
        "store": str(folder / "store"),
        "pool": {"path": "pool"},
        "target": {"path": "target"},
        "selection": {"tau": 8},
        "train": {"num_tokens": 1000},
    }
    sweep = {"over": {"selection.tau": [4, 8]}, "metric": "target.color.heldout_nll"}
    with pytest.raises(SpecError, match=r"of `job: select` is known at the end alone"):
        parse_spec(content | {"sweep": sweep | {"stop": {"name": "asha"}}}, "spec")
