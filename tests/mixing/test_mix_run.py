"""A whole mixing run in one process and in two: rewards, resume, replay, early stop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mixing_world import ARMS, make_world, mix_task

from stillhouse.errors import DivergedError
from stillhouse.mixing.decisions import log_parts, read_decisions
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.exp3 import Exp3
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.policy import StepPlan
from stillhouse.mixing.replay import Replay
from stillhouse.mixing.run import run_mix
from stillhouse.mixing.static import TargetOnly
from stillhouse.mixing.task import StoredModel
from stillhouse.mixing.ucb1 import Ucb1
from stillhouse.training.group import WorkerGroup

CPU = torch.device("cpu")
UCB1 = Ucb1(name="ucb1", initial_examples=8)
BEFORE = StepPlan(2, "aggregate")
AFTER = StepPlan(2, "alignment", "after_step")


class Stopped(Exception):
    """A kill."""


def stop(step):
    if step == 6:
        raise Stopped


def run(store, task, **options):
    return run_mix(store, task, Mixer(task), device=CPU, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing")
    return folder, *make_world(folder)


def task_of(world, **changes):
    folder, store, _, parts, target = world
    return mix_task(folder, store, parts, target, **changes)


def test_a_bandit_avoids_the_arm_that_is_noise(world):
    made = run(world[1], task_of(world, policy=UCB1, plan=BEFORE, steps=24, label="prefers"))
    totals = made.totals
    assert sum(totals["draws"].values()) == 24 * 4
    assert min(totals["draws"], key=totals["draws"].get) == "noise"
    # 24 steps of 4 + 2 passes, and the initial pass: 2 batches of each arm and 2 of the target
    assert totals["gradient_passes"] == 24 * 6 + 3 * 2 + 2
    assert len(totals["losses"]) == 24 and [row["step"] for row in totals["curve"]][-1] == 24
    assert totals["test"]["num_rows"] == 20 and 0 <= totals["test"]["accuracy"] <= 1
    json.dumps(totals)


@pytest.mark.parametrize(("plan", "optimizer"), [(BEFORE, "adafactor"), (AFTER, "adamw")])
def test_a_killed_run_goes_on_bitwise(world, plan, optimizer):
    label = f"kill {optimizer}"
    options = {"policy": UCB1, "plan": plan, "optimizer": optimizer}
    whole = run(world[1], task_of(world, label=label, **options))
    task = task_of(world, label=label + " again", **options)
    with pytest.raises(Stopped):
        run(world[1], task, on_step=stop)
    resumed = run(world[1], task)
    for key in ("decisions_sha256", "draws", "losses", "curve", "test", "gradient_passes"):
        assert resumed.totals[key] == whole.totals[key], key
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]


def test_a_run_under_another_spec_takes_its_log_along(world):
    first = task_of(world, policy=UCB1, plan=BEFORE, label="elsewhere")
    with pytest.raises(Stopped):
        run(world[1], first, on_step=stop)
    moved = replace(first, log=world[1].path("runs/other/log"))
    totals = run(world[1], moved).totals
    log, _ = read_decisions(log_parts(moved.log))
    assert [(d.step, d.slot) for d in log] == [(s, g) for s in range(12) for g in range(4)]
    assert totals["log"] == moved.log


def test_the_target_alone_draws_nothing(world):
    policy = TargetOnly(name="target_only")
    totals = run(world[1], task_of(world, policy=policy, plan=StepPlan(6))).totals
    assert totals["draws"] == dict.fromkeys(ARMS, 0)
    assert totals["gradient_passes"] == 12 * 6
    assert all(auxiliary is None for auxiliary, _ in totals["losses"])


def test_patience_ends_a_run_and_the_best_is_kept(world):
    task = task_of(world, label="patience", learning_rate=0.5, patience=1, steps=200)
    totals = run(world[1], task).totals
    assert totals["num_steps"] < 200
    scores = [(-row["validation_accuracy"], row["validation_nll"]) for row in totals["curve"]]
    assert totals["curve"][scores.index(min(scores))]["step"] == totals["best_step"]


def test_a_decoder_learns_too(world):
    task = task_of(world, policy=Exp3(name="exp3"), plan=BEFORE, decoder=True, label="decoder")
    losses = [target for _, target in run(world[1], task).totals["losses"]]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_stops(world):
    task = task_of(world, label="diverges", learning_rate=1e30, plan=StepPlan(0))
    with pytest.raises(DivergedError, match=r"lower `train\.learning_rate`"):
        run(world[1], task)


def test_doremi_weighs_by_what_the_reference_knows(world):
    """And its reference, a uniform run without a target pass, learns nothing of the target."""
    task = task_of(world, plan=StepPlan(0), label="reference")
    start = run(world[1], task)
    assert start.totals["gradient_passes"] == 12 * 4
    assert all(target is None for _, target in start.totals["losses"])
    parts = sorted(path.name for path in Path(task.log).iterdir())
    assert parts == [f"{step:08d}.parquet" for step in (4, 8, 12)]
    given = StoredModel("digest", world[1].path("models", start.fingerprint))
    policy, plan = DoReMi(name="doremi", path="x"), StepPlan(0, "excess")
    task = task_of(world, policy=policy, plan=plan, label="proxy", reference=given, seed=1)
    totals = run(world[1], task).totals
    assert totals["average_weights"].keys() == {*ARMS}
    assert sum(totals["average_weights"].values()) == pytest.approx(1)
    assert len({*totals["average_weights"].values()}) == 3


def worker(rank, folder, store, tasks):
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for task in tasks:
        run_mix(store, task, Mixer(task), device=CPU, group=WorkerGroup.current())
    dist.destroy_process_group()


def test_two_workers_replay_one(world, tmp_path):
    sizes = {"policy": UCB1, "slots": 5}
    first = task_of(world, plan=BEFORE, label="one", steps=6, **sizes)
    later = task_of(world, plan=AFTER, label="two", steps=3, **sizes)
    alone = [run(world[1], task).totals for task in (first, later)]
    replay = sizes | {"policy": Replay(name="replay", log=first.log)}
    tasks = [
        task_of(world, plan=StepPlan(2), label="replay", steps=6, **replay),
        replace(later, decided_by={"label": "two, by two"}),
    ]
    torch.multiprocessing.spawn(worker, (str(tmp_path), world[1], tasks), nprocs=2)
    made = [world[1].get_manifest("models", task.fingerprint).totals for task in tasks]
    assert made[0]["workers"] == 2
    for found, wanted in zip(made, alone, strict=True):
        assert found["decisions_sha256"] == wanted["decisions_sha256"]
        for mine, theirs in zip(found["losses"], wanted["losses"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
