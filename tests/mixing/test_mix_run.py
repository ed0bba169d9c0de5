"""A whole mixing run in one process and in two: rewards, resume, replay, early stop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mixing_world import ARMS, make_world, mix_task

from stillhouse.errors import DivergedError, SpecError
from stillhouse.mixing.decision_log import log_parts
from stillhouse.mixing.decisions import read_decisions
from stillhouse.mixing.doremi import DoReMiSettings
from stillhouse.mixing.exp3 import Exp3Settings
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.replay import ReplaySettings
from stillhouse.mixing.run import run_mix
from stillhouse.mixing.ucb1 import Ucb1Settings
from stillhouse.mixing.uniform import TargetOnlySettings, UniformSettings
from stillhouse.training.group import WorkerGroup

CPU = torch.device("cpu")
UCB1 = Ucb1Settings(name="ucb1", initial_examples=8)
BEFORE = StepPlan(2, "aggregate")
AFTER = StepPlan(2, "alignment", "after_step")


class Stopped(Exception):
    """A kill."""


def run(store, task, **options):
    return run_mix(store, task, Mixer(task.mixer), device=CPU, **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing")
    return folder, *make_world(folder)


def task_of(world, **changes):
    folder, store, _, parts, target = world
    return mix_task(folder, store, parts, target, **changes)


def test_a_bandit_avoids_the_arm_that_is_noise(world):
    made = run(world[1], task_of(world, settings=UCB1, plan=BEFORE, steps=24, label="prefers"))
    totals = made.totals
    assert sum(totals["draws"].values()) == 24 * 4
    assert min(totals["draws"], key=totals["draws"].get) == "noise"
    # 24 steps of 4 + 2 passes, and the initial pass: 2 batches of each arm and 2 of the target
    assert totals["gradient_passes"] == 24 * 6 + 3 * 2 + 2
    assert len(totals["losses"]) == 24 and [row["step"] for row in totals["curve"]][-1] == 24
    assert totals["test"]["num_rows"] == 20 and 0 <= totals["test"]["accuracy"] <= 1


@pytest.mark.parametrize("plan", [BEFORE, StepPlan(2, "alignment", "after_step", "lm_head")])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_killed_run_goes_on_bitwise(world, plan, optimizer):
    label = f"kill {plan.reward} {optimizer}"
    options = {"settings": UCB1, "plan": plan, "optimizer": optimizer}
    whole = run(world[1], task_of(world, label=label, **options))
    task = task_of(world, label=label + " again", **options)

    def stop(step, num_steps):
        if step == 6:
            raise Stopped

    with pytest.raises(Stopped):
        run(world[1], task, on_step=stop)
    resumed = run(world[1], task)
    for key in ("decisions_sha256", "draws", "losses", "curve", "test", "gradient_passes"):
        assert resumed.totals[key] == whole.totals[key], key
    assert resumed.files["model.safetensors"] == whole.files["model.safetensors"]


def test_a_replay_gives_order_and_losses(world):
    first = task_of(world, settings=UCB1, plan=BEFORE, label="first")
    made = run(world[1], first)
    replay = ReplaySettings(name="replay", log=first.mixer.log)
    again = run(world[1], task_of(world, settings=replay, plan=StepPlan(2), label="again"))
    assert again.totals["decisions_sha256"] == made.totals["decisions_sha256"]
    assert again.totals["losses"] == made.totals["losses"]
    other = task_of(world, settings=replay, plan=StepPlan(2), label="other", seed=1)
    with pytest.raises(SpecError, match=r"is of seed 0: set `seeds: \[0\]`"):
        run(world[1], other)


def test_a_run_under_another_spec_takes_its_log_along(world):
    first = task_of(world, settings=UCB1, plan=BEFORE, label="elsewhere")

    def stop(step, num_steps):
        if step == 6:
            raise Stopped

    with pytest.raises(Stopped):
        run(world[1], first, on_step=stop)
    moved = replace(first, mixer=replace(first.mixer, log=world[1].path("runs/other/log")))
    totals = run(world[1], moved).totals
    log, _ = read_decisions(log_parts(moved.mixer.log))
    assert [(d.step, d.slot) for d in log] == [(s, g) for s in range(12) for g in range(4)]
    assert totals["log"] == moved.mixer.log


def test_the_target_alone_draws_nothing(world):
    settings = TargetOnlySettings(name="target_only")
    made = run(world[1], task_of(world, settings=settings, plan=StepPlan(6), label="alone"))
    assert made.totals["draws"] == dict.fromkeys(ARMS, 0)
    assert made.totals["gradient_passes"] == 12 * 6
    assert all(auxiliary is None for auxiliary, _ in made.totals["losses"])


def test_patience_ends_a_run_and_the_best_is_kept(world):
    learning = task_of(world).learning.model_copy(update={"learning_rate": 0.5})
    task = task_of(world, label="patience", learning=learning, patience=1, steps=200)
    totals = run(world[1], task).totals
    assert totals["num_steps"] < 200
    scores = [(-row["validation_accuracy"], row["validation_nll"]) for row in totals["curve"]]
    assert totals["curve"][scores.index(min(scores))]["step"] == totals["best_step"]


def test_a_decoder_learns_too(world):
    settings = Exp3Settings(name="exp3")
    task = task_of(world, settings=settings, plan=BEFORE, encoder_decoder=False, label="decoder")
    losses = [target for _, target in run(world[1], task).totals["losses"]]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_stops(world):
    learning = task_of(world).learning.model_copy(update={"learning_rate": 1e30})
    task = task_of(world, label="diverges", learning=learning, plan=StepPlan(0))
    with pytest.raises(DivergedError, match=r"lower `train\.learning_rate`"):
        run(world[1], task)


def test_a_first_reward_that_is_not_finite_stops(world):
    mixer = Mixer(task_of(world, settings=UCB1).mixer)
    with pytest.raises(DivergedError, match="first reward of arm `other` is nan"):
        mixer.begin([0.5, float("nan"), 0.1])


def test_doremi_weighs_by_what_the_reference_knows(world):
    start = run(world[1], task_of(world, plan=StepPlan(0), label="reference"))
    settings = DoReMiSettings(name="doremi", path="x")
    folder = world[1].path("models", start.fingerprint)
    plan = StepPlan(0, "excess")
    task = task_of(world, settings=settings, plan=plan, label="proxy", reference=folder, seed=1)
    totals = run(world[1], task).totals
    assert totals["average_weights"].keys() == {*ARMS}
    assert sum(totals["average_weights"].values()) == pytest.approx(1)
    assert len({*totals["average_weights"].values()}) == 3


def worker(rank, folder, tasks):
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for store, task in tasks:
        run_mix(store, task, Mixer(task.mixer), device=CPU, group=WorkerGroup.current())
    dist.destroy_process_group()


def test_two_workers_replay_one(world, tmp_path):
    free = {
        "before": task_of(world, settings=UCB1, plan=BEFORE, label="one", slots=5, steps=6),
        "after": task_of(
            world,
            settings=UCB1,
            plan=StepPlan(2, "alignment", "after_step"),
            label="two",
            slots=5,
            steps=3,
        ),
    }
    alone = {name: run(world[1], task) for name, task in free.items()}
    replay = ReplaySettings(name="replay", log=free["before"].mixer.log)
    tasks = {
        "replay": task_of(
            world, settings=replay, plan=StepPlan(2), label="replay2", slots=5, steps=6
        ),
        "after": replace(free["after"], fingerprint="a" * 64),
    }
    torch.multiprocessing.spawn(
        worker, (str(tmp_path), [(world[1], task) for task in tasks.values()]), nprocs=2
    )
    made = {name: world[1].get_manifest("models", t.fingerprint) for name, t in tasks.items()}
    assert made["replay"].totals["workers"] == 2
    assert made["replay"].totals["decisions_sha256"] == alone["before"].totals["decisions_sha256"]
    for name, one in (("replay", "before"), ("after", "after")):
        for mine, theirs in zip(
            made[name].totals["losses"], alone[one].totals["losses"], strict=True
        ):
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_uniform_without_a_target_pass_learns_nothing_of_it(world):
    plan = StepPlan(0)
    task = task_of(world, settings=UniformSettings(name="uniform"), plan=plan, label="plain")
    totals = run(world[1], task).totals
    assert totals["gradient_passes"] == 12 * 4
    assert all(target is None for _, target in totals["losses"])
    log = Path(task.mixer.log)
    assert sorted(p.name for p in log.iterdir()) == [f"{s:08d}.parquet" for s in (4, 8, 12)]
    json.dumps(totals)
