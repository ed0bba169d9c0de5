"""The mixer: the same decisions after any resume, its log, rewards that are not finite."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mixing_world import mix_task

from stillhouse.errors import DivergedError, InputError, SpecError
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.decisions import (
    Decision,
    chain,
    log_parts,
    quantise,
    read_decisions,
    write_decisions,
)
from stillhouse.mixing.exp3 import Exp3
from stillhouse.mixing.mixer import MAX_BAD_REWARDS, Mixer, check_arms
from stillhouse.mixing.replay import Replay
from stillhouse.mixing.ucb1 import Ucb1
from stillhouse.storage.artifact import Store

ARMS = ["sea", "law", "code", "food"]
G = 3
POLICIES = [Exp3(name="exp3", initial_pass=True, smoothing=0.5), Ucb1(name="ucb1")]


@pytest.fixture
def task(tmp_path):
    parts = [ArmPart(name, "", 1) for name in ARMS]
    store = Store(str(tmp_path / "store"))
    return mix_task(tmp_path, store, parts, "", policy=POLICIES[0], slots=G, seed=1)


def begun(task):
    mixer = Mixer(task)
    mixer.begin([0.5, 0.25, 0.1, 0.0])
    return mixer


def run(mixer, num_steps):
    dealt = []
    for _ in range(num_steps):
        arms = mixer.deal().arms
        mixer.learn({arm: 0.1 * arm + 0.00003 for arm in arms})
        dealt.append(arms)
    return dealt


def logged(task):
    return read_decisions(log_parts(task.log))


@pytest.mark.parametrize("killed_after", range(5))
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_resumed_at_any_step_decides_the_same(task, policy, killed_after):
    task = replace(task, rule=replace(task.rule, policy=policy))
    whole, first = begun(task), begun(replace(task, log=task.log + "-again"))
    expected, end = run(whole, 5), whole.checkpoint()
    head = run(first, killed_after)
    state = json.loads(json.dumps(first.checkpoint()))
    second = Mixer(replace(task, log=task.log + "-again"))
    second.resume(state)
    assert head + run(second, 5 - killed_after) == expected
    assert second.checkpoint() == end | {"log": task.log + "-again"}
    assert second.summary() == whole.summary()
    assert logged(replace(task, log=task.log + "-again")) == logged(task)


def test_the_log_holds_what_was_decided(task):
    mixer = begun(task)
    dealt = run(mixer, 3)
    mixer.checkpoint()
    rows, arms = logged(task)
    played = [arm for step in dealt for arm in step]
    assert arms == ARMS and [row.arm for row in rows] == played
    assert [(row.step, row.slot) for row in rows] == [(s, g) for s in range(3) for g in range(G)]
    uniforms = np.random.Generator(np.random.PCG64(1)).random(9).tolist()
    assert [row.uniform for row in rows] == uniforms
    assert [row.reward for row in rows] == [round(102.4 * row.arm) / 1024 for row in rows]
    assert [i for i, row in enumerate(rows) if row.probabilities] == [0, 6]  # `log_every` is 2
    assert rows[0].probabilities == [0.25] * 4 and rows[0].indices is None
    draws = {name: played.count(arm) for arm, name in enumerate(ARMS)}
    assert mixer.summary()["draws"] == draws


def test_indices_are_logged_for_ucb1(task):
    task = replace(task, rule=replace(task.rule, policy=POLICIES[1]))
    mixer = begun(task)
    run(mixer, 1)
    mixer.checkpoint()
    row = logged(task)[0][0]
    assert row.probabilities == [1, 0, 0, 0]
    bonus = np.sqrt(2 * np.log(4))
    rewards = [0.5, 0.25, round(102.4) / 1024, 0]
    assert row.indices == pytest.approx([reward + bonus for reward in rewards])


def test_a_log_in_parts_is_replayed_to_the_same_decisions(task):
    mixer = begun(task)
    dealt = run(mixer, 3)
    mixer.checkpoint()
    dealt += run(mixer, 2)
    mixer.checkpoint()
    again = replace(task, rule=replace(task.rule, policy=Replay(name="replay", log=task.log)))
    replayed = Mixer(replace(again, log=task.log + "-replayed"))
    replayed.begin([])
    assert run(replayed, 5) == dealt
    assert replayed.summary() == mixer.summary()


def test_parts_of_a_log_are_read_once_each_in_order():
    rows = [Decision(step, 0, 0.5, 1) for step in range(3)]
    parts = [write_decisions(of, ARMS) for of in (rows[1:], rows[:2], rows[:2])]
    assert read_decisions(parts) == (rows, ARMS)
    assert write_decisions(rows, ARMS) == write_decisions(rows, ARMS)
    other = write_decisions([Decision(0, 0, 0.5, 0)], ARMS)
    with pytest.raises(InputError, match=r"step 0, slot 0.*disagree"):
        read_decisions([parts[1], other])
    with pytest.raises(InputError, match="no parts"):
        read_decisions([])


def test_chain_depends_on_step_and_order():
    ends = {chain("", 0, [1, 2]), chain("", 0, [2, 1]), chain("", 1, [1, 2]), chain("a", 0, [1, 2])}
    assert len(ends) == 4 and all(len(end) == 64 for end in ends)


def test_rewards_are_quantised_before_they_are_learnt(task):
    assert quantise(0.1) == 102 / 1024 and quantise(-0.1) == -102 / 1024
    assert quantise(1.5 / 1024) == quantise(2.5 / 1024) == 2 / 1024
    first, second = begun(task), begun(task)
    arms = first.deal().arms
    second.deal()
    first.learn(dict.fromkeys(arms, 0.5))
    second.learn(dict.fromkeys(arms, 0.5 + 0.0004))
    assert first.checkpoint() == second.checkpoint()


def test_a_reward_that_is_not_finite_is_named_and_not_learnt(task):
    mixer = begun(task)
    before = mixer.checkpoint()["policy"]["mean_reward"]
    arms = mixer.deal().arms
    complaints = mixer.learn(dict.fromkeys(arms, float("nan")))
    assert complaints[0] == f"step 0: the reward of arm `{ARMS[min(arms)]}` is nan"
    assert mixer.checkpoint()["policy"]["mean_reward"] == before
    assert [row.reward for row in logged(task)[0]] == [None] * G
    for _ in range(MAX_BAD_REWARDS - len(complaints)):
        mixer.learn({mixer.deal().arms[0]: float("inf")})
    arm = mixer.deal().arms[0]
    with pytest.raises(DivergedError, match=rf"is inf; {MAX_BAD_REWARDS + 1} rewards were not"):
        mixer.learn({arm: float("inf")})


def test_a_first_reward_that_is_not_finite_stops(task):
    with pytest.raises(DivergedError, match="first reward of arm `law` is nan"):
        Mixer(task).begin([0.5, float("nan"), 0.1, 0.2])


def test_arms_that_cannot_be_mixed():
    with pytest.raises(SpecError, match="1 arm"):
        check_arms(["a"])
    with pytest.raises(SpecError, match=r"one name: \['a'\]"):
        check_arms(["a", "b", "a"])


def test_a_checkpoint_with_other_arms(task):
    state = begun(task).checkpoint() | {"arms": ["sea", "law", "code", "tea"]}
    with pytest.raises(SpecError, match=r"gone from the spec: \['tea'\], new: \['food'\]"):
        Mixer(task).resume(state)
