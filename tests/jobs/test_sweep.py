"""`sweep` beside a job's keys, on real Ray, against the variants run one by one by hand."""

import json
from itertools import product
from pathlib import Path

import optuna
import pytest
import yaml
from small import LEARNING, Quiet, make_world, small_training

from stillhouse.errors import SpecError, StepFailedError
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.sweep import optuna_search
from stillhouse.jobs.verify import verify
from stillhouse.report.page import read

RATES, BATCHES = [3e-3, 3e-2, 1e30], [8, 16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sweep"), shards=1, per_shard=60)


def content_of(folder, **changes):
    """A training of 20 steps with a held-out loss."""
    return small_training(folder, 20, **changes)


def swept(folder, sweep=None, **changes):
    over = {"train.learning_rate": RATES, "train.global_batch": BATCHES}
    settings = {"over": over, "metric": "train.heldout_nll"} | (sweep or {})
    return parse_spec(content_of(folder, **changes) | {"sweep": settings}, "spec")


@pytest.fixture(scope="module")
def made(ray_cluster, folder):
    return run_spec(swept(folder), Quiet())


def test_the_best_variant_is_the_result(made, folder):
    """Every variant that ran has the loss of a run by hand; rates of 1e30 diverge."""
    found = made["sweep"]["variants"]
    values = [tuple(one["values"].values()) for one in found]
    assert values == [*product(RATES, BATCHES)]
    assert [one["status"] for one in found] == ["done"] * 4 + ["failed"] * 2
    assert all("lower `learning_rate`" in one["error"] for one in found[4:])
    losses = []
    for rate, batch in values[:4]:
        training = content_of(folder)["train"] | {"learning_rate": rate, "global_batch": batch}
        by_hand = run_job(parse_spec(content_of(folder, train=training), "spec"), Quiet())
        assert by_hand["status"] == "nothing_to_do"
        losses.append((by_hand["train"]["heldout_halves"]["validation"], by_hand["run"], by_hand))
    assert [one["metric"] for one in found[:4]] == [loss for loss, _, _ in losses]
    best = min(losses, key=lambda one: one[0])
    assert made["sweep"]["chosen"]["run"] == made["run"] == best[1]
    assert made["artifacts"] == best[2]["artifacts"] and made["train"] == best[2]["train"]
    assert made["sweep"]["chosen"]["test"] == made["train"]["heldout_halves"]["test"]
    assert (made["status"], made["job"]) == ("done", "train")
    costs = [(one["flops"], one["device_seconds"]) for one in found]
    assert costs[0] == (best[2]["cost"]["flops"]["train"], pytest.approx(costs[0][1]))
    assert all(seconds > 0 for _, seconds in costs[:4]) and costs[4:] == [(None, None)] * 2
    assert verify(made["run"], 4)["problems"] == []


def test_the_halves_make_up_the_whole(made):
    """Their means, weighted by predicted tokens, are the mean over all; neither is half empty."""
    manifest = json.loads(Path(made["artifacts"]["model"], "manifest.json").read_text())
    last = manifest["totals"]["evaluations"][-1]
    one, two = last["halves"]["validation"], last["halves"]["test"]
    assert one["nll"] != two["nll"]
    whole = one["nll"] * one["num_tokens"] + two["nll"] * two["num_tokens"]
    count = one["num_tokens"] + two["num_tokens"]
    assert whole / count == pytest.approx(last["nll"], rel=1e-5)
    assert abs(one["num_tokens"] - two["num_tokens"]) < 0.2 * count


def test_again_there_is_nothing_to_do_but_what_failed(made, folder):
    over = {"train.learning_rate": RATES[:2], "train.global_batch": BATCHES}
    less = run_spec(swept(folder, {"over": over}), Quiet())
    assert less["run"] == made["run"] and less["status"] == "done"  # its own record is new
    assert {one["status"] for one in less["sweep"]["variants"]} == {"reused"}
    again = run_spec(swept(folder, {"over": over}), Quiet())
    assert again["status"] == "nothing_to_do"
    assert again["sweep"]["chosen"]["values"] == made["sweep"]["chosen"]["values"]
    assert plan_spec(swept(folder, {"over": over}))["status"] == "nothing_to_do"


def test_the_report_shows_all(made):
    report = read(made["sweep"]["run"])
    (table,) = report.find("variants", "table")
    assert len(table.rows) == 6 and table.rows[0][0] == table.main
    assert "failed" in {row[2] for row in table.rows}
    (facts,) = report.find("lead", "facts")
    assert [fact.name for fact in facts.facts] == ["train.heldout_nll", "Test", "Variants"]
    page = Path(made["report"]).read_text()
    assert "train.heldout_nll" in page and made["sweep"]["run"] in page


def test_random_variants_are_those_of_the_seed(folder):
    over = {
        "train.learning_rate": {"min": 1e-3, "max": 1e-1, "log": True},
        "train.global_batch": [8],
    }
    sweep = {"search": "random", "over": over, "max_runs": 4, "seed": 3}
    variants = [swept(folder, sweep).sweep.variants() for _ in range(2)]
    assert variants[0] == variants[1] and len(variants[0]) == 4
    assert all(1e-3 <= one["train.learning_rate"] < 1e-1 for one in variants[0])
    other = swept(folder, sweep | {"seed": 4}).sweep.variants()
    assert other != variants[0]


def test_a_budget_leaves_out_the_same_variants_again(ray_cluster, folder, tmp_path):
    """6 N FLOPs a token in N parameters: 2 of 3 equally long trainings are paid for, now and after
    they ran; once a variant has run by hand, nothing changes either."""
    changes = {"store": str(tmp_path / "store")}
    rates = {"train.learning_rate": [1e-3, 3e-3, 1e-2], "train.global_batch": [8]}
    planned = plan_spec(swept(folder, {"over": rates}, **changes))["steps"]
    (each,) = {row["flops"] for name, row in planned.items() if name.endswith(": train")}
    sweep = {"over": rates, "max_flops": 2.5 * each}
    assert "leaves out 1 of 3" in str(plan_spec(swept(folder, sweep, **changes))["notes"])
    first = run_spec(swept(folder, sweep, **changes), Quiet())
    statuses = [one["status"] for one in first["sweep"]["variants"]]
    assert statuses == ["done", "done", "left out"]
    assert plan_spec(swept(folder, sweep, **changes))["status"] == "nothing_to_do"
    again = run_spec(swept(folder, sweep, **changes), Quiet())
    assert again["status"] == "nothing_to_do"
    assert again["sweep"] == first["sweep"]
    by_hand = content_of(folder, **changes)["train"] | {"learning_rate": 1e-2, "global_batch": 8}
    run_job(parse_spec(content_of(folder, train=by_hand, **changes), "spec"), Quiet())
    assert run_spec(swept(folder, sweep, **changes), Quiet())["sweep"] == first["sweep"]
    assert verify(first["sweep"]["run"], 4)["problems"] == []


def by_optuna(metrics):
    """What a study of optuna itself proposes, told the same metrics; None is of a failure."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=5))
    rates = []
    for metric in metrics:
        trial = study.ask()
        rates.append(trial.suggest_float("train.learning_rate", 1e-3, 1e-1, log=True))
        state = optuna.trial.TrialState.FAIL if metric is None else None
        study.tell(trial, metric, state=state)
    return rates


def test_proposals_are_those_of_optuna(folder):
    """Beyond the random ones, too, with failures among them."""
    over = {"train.learning_rate": {"min": 1e-3, "max": 1e-1, "log": True}}
    search = optuna_search(swept(folder, {"search": "optuna", "over": over, "max_runs": 9}).sweep)
    metrics = [3.0, None, 2.0, 2.5, None, 1.5, 1.75, 1.25, 1.0]
    proposed = []
    for number, metric in enumerate(metrics):
        proposed.append(search.suggest(str(number))["train.learning_rate"])
        told = None if metric is None else {"metric": metric}
        search.on_trial_complete(str(number), told, error=metric is None)
    assert proposed == by_optuna(metrics) and len({*proposed}) == 9


def test_optuna_goes_on_from_what_it_found(made, folder):
    over = {"train.learning_rate": {"min": 1e-3, "max": 1e-1, "log": True}}
    sweep = {"search": "optuna", "over": over, "max_runs": 2}
    found = run_spec(swept(folder, sweep), Quiet())["sweep"]
    rates = [one["values"]["train.learning_rate"] for one in found["variants"]]
    assert len({*rates}) == 2 and rates == by_optuna([one["metric"] for one in found["variants"]])
    assert found["chosen"]["metric"] == min(one["metric"] for one in found["variants"])
    again = run_spec(swept(folder, sweep | {"max_runs": 3}), Quiet())["sweep"]["variants"]
    assert [one["values"]["train.learning_rate"] for one in again[:2]] == rates
    assert [one["status"] for one in again] == ["reused"] * 2 + ["done"]


def test_a_sweep_is_a_step_of_a_chain(made, folder):
    steps = {
        "base": {k: v for k, v in content_of(folder).items() if k not in ("store", "compute")}
        | {"sweep": {"over": {"train.learning_rate": RATES[:2]}, "metric": "train.heldout_nll"}},
        "more": {
            "job": "train",
            "data": {"path": str(folder / "pool" / "*.parquet")},
            "sequence_length": 32,
            "init": {"from": "base"},
            "train": {"num_tokens": 32 * 8 * 5, "dtype": "float32", **LEARNING},
        },
    }
    content = {"job": "chain", "store": str(folder / "store"), "steps": steps}
    spec = parse_spec(content | {"compute": {"trainers": 1, "packers": 1}}, "spec")
    found = run_spec(spec, Quiet())["chain"]["steps"]
    chosen = found["base"]["sweep"]["chosen"]["run"]
    assert found["base"]["run"] == chosen
    more = json.loads(Path(found["more"]["artifact"], "manifest.json").read_text())
    assert "weights" in more["settings"]["model"]
    assert parse_spec(yaml.safe_load(spec.to_send()), "sent") == spec


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"over": {"compute.trainers": [1, 2]}}, r"over.compute.trainers` changes no result"),
        ({"over": {"train.larning_rate": [1]}}, r"unknown key `train.larning_rate`"),
        (
            {"over": {"train.learning_rate": [-1.0]}},
            r"`train.learning_rate`: -1.0: input should",
        ),
        ({"over": {"train.learning_rate": {"min": 1, "max": 2}}}, r"is a range: give values"),
        ({"search": "random"}, r"`max_runs`: `search: random` needs it"),
        ({"max_flops": 1.0}, r"`sweep.max_flops: 1` pays for no variant"),
    ],
)
def test_bad_sweeps(folder, tmp_path, sweep, said):
    with pytest.raises(SpecError, match=said):
        run_spec(swept(folder, sweep, store=str(tmp_path)), Quiet())


def test_a_metric_that_is_not_there_and_variants_that_all_fail(made, folder):
    over = {"train.learning_rate": RATES[:1], "train.global_batch": [8]}
    with pytest.raises(SpecError, match=r"`train` has no `loss`; it has: .*heldout_nll"):
        run_spec(swept(folder, {"metric": "train.loss", "over": over}), Quiet())
    over["train.learning_rate"] = RATES[2:]
    with pytest.raises(StepFailedError, match=r"the only variant failed, .*learning_rate"):
        run_spec(swept(folder, {"over": over}), Quiet())
