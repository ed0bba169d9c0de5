"""The mixer: the same decisions after any resume, its log, rewards that are not finite."""

import json

import numpy as np
import pytest
from mixing_world import mix_task

from stillhouse.errors import DivergedError, InputError
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.decisions import (
    Decision,
    Replay,
    chain,
    log_parts,
    read_decisions,
    write_decisions,
)
from stillhouse.mixing.flad import Exp3, Ucb1
from stillhouse.mixing.mixer import MAX_BAD_REWARDS, Mixer, quantise
from stillhouse.storage.artifact import Store

ARMS = ["sea", "law", "code", "food"]
G = 3
EXP3, UCB1 = Exp3(name="exp3", initial_pass=True, smoothing=0.5), Ucb1(name="ucb1")


@pytest.fixture
def task_of(tmp_path):
    def make(policy=EXP3, log="log"):
        parts, store = [ArmPart(name, "", 1) for name in ARMS], Store(str(tmp_path))
        options = {"slots": G, "seed": 1, "log": store.path(log)}
        return mix_task(tmp_path, store, parts, "", policy=policy, **options)

    return make


def begun(task):
    mixer = Mixer(task)
    mixer.begin([0.5, 0.25, 0.1, 0.0])
    return mixer


def run(mixer, num_steps):
    drawn = []
    for _ in range(num_steps):
        arms = mixer.draw().arms
        mixer.learn({arm: 0.1 * arm + 0.00003 for arm in arms})
        drawn.append(arms)
    return drawn


def logged(task):
    return read_decisions(log_parts(task.log))


@pytest.mark.parametrize("killed_after", range(5))
@pytest.mark.parametrize("policy", [EXP3, UCB1], ids=lambda policy: policy.name)
def test_resumed_at_any_step_decides_the_same(task_of, policy, killed_after):
    task, again = task_of(policy), task_of(policy, "again")
    whole, first, second = begun(task), begun(again), Mixer(again)
    expected, end = run(whole, 5), whole.checkpoint()
    head = run(first, killed_after)
    second.resume(json.loads(json.dumps(first.checkpoint())))
    assert head + run(second, 5 - killed_after) == expected
    assert second.checkpoint() == end | {"log": again.log}
    assert second.summary() == whole.summary()
    assert logged(again) == logged(task)


def test_the_log_holds_what_was_decided(task_of):
    task = task_of()
    mixer = begun(task)
    drawn = run(mixer, 3)
    mixer.checkpoint()
    rows, arms = logged(task)
    played = [arm for step in drawn for arm in step]
    assert arms == ARMS and [row.arm for row in rows] == played
    assert [(row.step, row.slot) for row in rows] == [(s, g) for s in range(3) for g in range(G)]
    uniforms = np.random.Generator(np.random.PCG64(1)).random(9).tolist()
    assert [row.uniform for row in rows] == uniforms
    assert [row.reward for row in rows] == [round(102.4 * row.arm) / 1024 for row in rows]
    assert [i for i, row in enumerate(rows) if row.probabilities] == [0, 6]  # `log_every` is 2
    assert rows[0].probabilities == [0.25] * 4 and rows[0].indices is None
    draws = {name: played.count(arm) for arm, name in enumerate(ARMS)}
    assert mixer.summary()["draws"] == draws


def test_indices_are_logged_for_ucb1(task_of):
    task = task_of(UCB1)
    mixer = begun(task)
    run(mixer, 1)
    mixer.checkpoint()
    row = logged(task)[0][0]
    assert row.probabilities == [1, 0, 0, 0]
    rewards = np.array([0.5, 0.25, round(102.4) / 1024, 0])
    assert row.indices == pytest.approx((rewards + np.sqrt(2 * np.log(4))).tolist())


def test_a_log_in_parts_is_replayed_to_the_same_decisions(task_of):
    task = task_of()
    mixer, drawn = begun(task), []
    for num_steps in (3, 2):
        drawn += run(mixer, num_steps)
        mixer.checkpoint()
    replayed = Mixer(task_of(Replay(name="replay", log=task.log), "replayed"))
    replayed.begin([])
    assert run(replayed, 5) == drawn
    assert replayed.summary() == mixer.summary()


def test_parts_of_a_log_are_read_once_each_in_order():
    rows = [Decision(step, 0, 0.5, 1) for step in range(3)]
    parts = [write_decisions(of, ARMS) for of in (rows[1:], rows[:2], rows[:2])]
    assert read_decisions(parts) == (rows, ARMS)
    assert write_decisions(rows, ARMS) == write_decisions(rows, ARMS)
    other = write_decisions([Decision(0, 0, 0.5, 0)], ARMS)
    with pytest.raises(InputError, match=r"step 0, slot 0.*disagree"):
        read_decisions([parts[1], other])


def test_chain_depends_on_step_and_order():
    ends = {chain("", 0, [1, 2]), chain("", 0, [2, 1]), chain("", 1, [1, 2]), chain("a", 0, [1, 2])}
    assert len(ends) == 4 and all(len(end) == 64 for end in ends)


def test_rewards_are_rounded_before_they_are_learned(task_of):
    assert quantise(0.1) == 102 / 1024 and quantise(-0.1) == -102 / 1024
    assert quantise(1.5 / 1024) == quantise(2.5 / 1024) == 2 / 1024
    states = []
    for noise in (0, 0.0004):
        mixer = begun(task_of())
        mixer.learn(dict.fromkeys(mixer.draw().arms, 0.5 + noise))
        states.append(mixer.checkpoint())
    assert states[0] == states[1]


def test_a_reward_that_is_not_finite_is_named_and_not_learned(task_of):
    task = task_of()
    mixer = begun(task)
    before = mixer.checkpoint()["policy"]["mean_reward"]
    arms = mixer.draw().arms
    complaints = mixer.learn(dict.fromkeys(arms, float("nan")))
    assert complaints[0] == f"step 0: the reward of arm `{ARMS[min(arms)]}` is nan"
    assert mixer.checkpoint()["policy"]["mean_reward"] == before
    assert [row.reward for row in logged(task)[0]] == [None] * G
    for _ in range(MAX_BAD_REWARDS - len(complaints)):
        mixer.learn({mixer.draw().arms[0]: float("inf")})
    arm = mixer.draw().arms[0]
    with pytest.raises(DivergedError, match=rf"is inf; {MAX_BAD_REWARDS + 1} rewards were not"):
        mixer.learn({arm: float("inf")})
    with pytest.raises(DivergedError, match="first reward of arm `law` is nan"):
        Mixer(task).begin([0.5, float("nan"), 0.1, 0.2])
