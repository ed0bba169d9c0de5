"""A whole mixing run in one process and in two: rewards, resume, replay, early stop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mixing_world import ARMS, make_world

from stillhouse.errors import DivergedError
from stillhouse.mixing.decisions import Replay, log_parts, read_decisions
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.flad import Exp3, Ucb1
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.policy import StepPlan
from stillhouse.mixing.run import run_mix
from stillhouse.mixing.spec import StoredModel
from stillhouse.mixing.static import TargetOnly
from stillhouse.training.group import WorkerGroup

UCB1 = Ucb1(name="ucb1", initial_examples=8)
BEFORE = StepPlan(2, "aggregate")
AFTER = StepPlan(2, "alignment", "after_step")


class Stopped(Exception):
    """A kill."""


def stop(step):
    if step == 6:
        raise Stopped


def run(store, task, **options):
    return run_mix(store, task, Mixer(task), device=torch.device("cpu"), **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("mixing"))


@pytest.fixture(scope="module")
def store(world):
    return world[0]


@pytest.fixture(scope="module")
def task_of(world):
    return world[1]


def test_a_bandit_avoids_the_arm_that_is_noise(store, task_of):
    totals = run(store, task_of(policy=UCB1, plan=BEFORE, steps=24, label="prefers")).totals
    assert sum(totals["draws"].values()) == 24 * 4
    assert min(totals["draws"], key=totals["draws"].get) == "noise"
    # 24 steps of 4 + 2 passes, and the initial pass: 2 batches of each arm and 2 of the target
    assert totals["gradient_passes"] == 24 * 6 + 3 * 2 + 2
    assert len(totals["losses"]) == 24 and [row["step"] for row in totals["curve"]][-1] == 24
    assert totals["test"]["num_rows"] == 20 and 0 <= totals["test"]["accuracy"] <= 1
    json.dumps(totals)


@pytest.mark.parametrize(("plan", "optimizer"), [(BEFORE, "adafactor"), (AFTER, "adamw")])
def test_a_killed_run_resumes_bitwise_and_takes_its_log_along(store, task_of, plan, optimizer):
    options = {"policy": UCB1, "plan": plan, "optimizer": optimizer}
    whole = run(store, task_of(label=f"kill {optimizer}", **options))
    task = task_of(label=f"kill {optimizer} again", **options)
    with pytest.raises(Stopped):
        run(store, task, on_step=stop)
    moved = replace(task, log=store.path("runs", "other", optimizer))  # as under another spec
    assert moved.fingerprint == task.fingerprint
    resumed = run(store, moved)
    for key in ("decisions_sha256", "draws", "losses", "curve", "test", "gradient_passes"):
        assert resumed.totals[key] == whole.totals[key], key
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]
    log, _ = read_decisions(log_parts(moved.log))
    assert log == read_decisions(log_parts(whole.totals["log"]))[0] and len(log) == 12 * 4
    assert resumed.totals["log"] == moved.log


def test_the_target_alone_draws_nothing(store, task_of):
    policy = TargetOnly(name="target_only")
    totals = run(store, task_of(policy=policy, plan=StepPlan(6))).totals
    assert totals["draws"] == dict.fromkeys(ARMS, 0)
    assert totals["gradient_passes"] == 12 * 6
    assert all(auxiliary is None for auxiliary, _ in totals["losses"])


def test_patience_ends_a_run_and_the_best_is_kept(store, task_of):
    task = task_of(label="patience", learning_rate=0.5, patience=1, steps=200)
    totals = run(store, task).totals
    assert totals["num_steps"] < 200
    scores = [(-row["validation_accuracy"], row["validation_nll"]) for row in totals["curve"]]
    assert totals["curve"][scores.index(min(scores))]["step"] == totals["best_step"]


def test_a_decoder_learns_too(store, task_of):
    task = task_of(policy=Exp3(name="exp3"), plan=BEFORE, decoder=True, label="decoder")
    losses = [target for _, target in run(store, task).totals["losses"]]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_stops(store, task_of):
    task = task_of(label="diverges", learning_rate=1e30, plan=StepPlan(0))
    with pytest.raises(DivergedError, match=r"lower `train\.learning_rate`"):
        run(store, task)


def test_doremi_weighs_by_what_the_reference_knows(store, task_of):
    """And its reference, a uniform run without a target pass, learns nothing of the target."""
    task = task_of(plan=StepPlan(0), label="reference")
    start = run(store, task)
    assert start.totals["gradient_passes"] == 12 * 4
    assert all(target is None for _, target in start.totals["losses"])
    parts = sorted(path.name for path in Path(task.log).iterdir())
    assert parts == [f"{step:08d}.parquet" for step in (4, 8, 12)]
    reference = StoredModel("digest", store.path("models", start.fingerprint))
    policy, plan = DoReMi(name="doremi", path="x"), StepPlan(0, "excess")
    task = task_of(policy=policy, plan=plan, label="proxy", reference=reference, seed=1)
    weights = run(store, task).totals["average_weights"]
    assert weights.keys() == {*ARMS} and sum(weights.values()) == pytest.approx(1)
    assert len({*weights.values()}) == 3


def worker(rank, folder, store, tasks):
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for task in tasks:
        run(store, task, group=WorkerGroup.current())
    dist.destroy_process_group()


def test_two_workers_replay_one(store, task_of, tmp_path):
    sizes = {"policy": UCB1, "slots": 5}
    first = task_of(plan=BEFORE, label="one", steps=6, **sizes)
    later = task_of(plan=AFTER, label="two", steps=3, **sizes)
    alone = [run(store, task).totals for task in (first, later)]
    replay = sizes | {"policy": Replay(name="replay", log=first.log)}
    tasks = [
        task_of(plan=StepPlan(2), label="replay", steps=6, **replay),
        replace(later, decided_by={"label": "two, by two"}),
    ]
    torch.multiprocessing.spawn(worker, (str(tmp_path), store, tasks), nprocs=2)
    made = [store.get_manifest("models", task.fingerprint).totals for task in tasks]
    assert made[0]["workers"] == 2
    for found, wanted in zip(made, alone, strict=True):
        assert found["decisions_sha256"] == wanted["decisions_sha256"]
        for mine, theirs in zip(found["losses"], wanted["losses"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
