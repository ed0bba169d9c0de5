import json

import numpy as np
import pytest

from stillhouse.errors import DivergedError, InputError, SpecError
from stillhouse.mixing.decisions import Decision, chain, read_decisions, write_decisions
from stillhouse.mixing.exp3 import Exp3
from stillhouse.mixing.replay import Replay
from stillhouse.mixing.schedule import DrawSchedule
from stillhouse.mixing.ucb1 import Ucb1

ARMS = ["sea", "law", "code", "food"]
G = 3


def schedule(policy=None, seed=1, **given):
    return DrawSchedule(
        policy or Exp3(len(ARMS), accumulation=G), ARMS, accumulation=G, seed=seed, **given
    )


def run(mixer, num_steps):
    dealt = []
    for _ in range(num_steps):
        arms = mixer.deal()
        mixer.learn({arm: 0.1 * arm + 0.00003 for arm in arms})
        dealt.append(arms)
    return dealt


@pytest.mark.parametrize("killed_after", range(5))
@pytest.mark.parametrize("make", [lambda: Exp3(4, accumulation=G), lambda: Ucb1(np.ones(4))])
def test_resumed_at_any_step_decides_the_same(make, killed_after):
    whole, first = schedule(make()), schedule(make())
    expected = run(whole, 5)
    head = run(first, killed_after)
    rows = first.take_decisions()
    second = schedule(make(), seed=99)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + run(second, 5 - killed_after) == expected
    assert rows + second.take_decisions() == whole.take_decisions()
    assert second.state_dict() == whole.state_dict()
    assert second.decisions_sha256 == whole.decisions_sha256


def test_log_holds_what_was_decided():
    mixer = schedule(log_every=2)
    dealt = run(mixer, 3)
    rows, played = mixer.take_decisions(), [arm for step in dealt for arm in step]
    assert [row.arm for row in rows] == played
    assert [(row.step, row.slot) for row in rows] == [(s, g) for s in range(3) for g in range(G)]
    uniforms = np.random.Generator(np.random.PCG64(1)).random(9).tolist()
    assert [row.uniform for row in rows] == uniforms
    assert [row.reward for row in rows] == [round(102.4 * row.arm) / 1024 for row in rows]
    assert [i for i, row in enumerate(rows) if row.probabilities] == [0, 6]
    assert rows[0].probabilities == [0.25] * 4 and rows[0].indices is None
    assert mixer.take_decisions() == []
    assert sum(mixer.draws.values()) == 9
    assert mixer.draws == {name: played.count(arm) for arm, name in enumerate(ARMS)}


def test_indices_are_logged_for_ucb1():
    mixer = schedule(Ucb1(np.zeros(4)))
    run(mixer, 1)
    row = mixer.take_decisions()[0]
    assert row.probabilities == [1, 0, 0, 0]
    assert row.indices == pytest.approx([np.sqrt(2 * np.log(4))] * 4)


def test_a_log_in_parts_is_replayed_to_the_same_decisions():
    mixer = schedule()
    dealt = run(mixer, 3)
    early = mixer.take_decisions()
    dealt += run(mixer, 2)
    late = mixer.take_decisions()
    parts = [write_decisions(rows, ARMS) for rows in (late, early, early)]
    decisions, arms = read_decisions(parts)
    assert decisions == early + late and arms == ARMS
    again = schedule(Replay(decisions, arms, ARMS), seed=7)
    assert run(again, 5) == dealt
    assert again.decisions_sha256 == mixer.decisions_sha256


def test_same_log_same_bytes():
    logs = []
    for _ in range(2):
        mixer = schedule()
        run(mixer, 4)
        logs.append(write_decisions(mixer.take_decisions(), ARMS))
    assert logs[0] == logs[1]


def test_parts_of_different_runs_are_refused():
    first, second = ([Decision(0, 0, 0.5, arm)] for arm in (0, 1))
    with pytest.raises(InputError, match=r"step 0, slot 0.*disagree"):
        read_decisions([write_decisions(rows, ARMS) for rows in (first, second)])
    with pytest.raises(InputError, match="no parts"):
        read_decisions([])


def test_chain_depends_on_step_and_order():
    ends = {chain("", 0, [1, 2]), chain("", 0, [2, 1]), chain("", 1, [1, 2]), chain("a", 0, [1, 2])}
    assert len(ends) == 4 and all(len(end) == 64 for end in ends)


def test_rewards_are_quantised_before_they_are_learnt():
    first, second = schedule(), schedule()
    arms = first.deal()
    second.deal()
    first.learn(dict.fromkeys(arms, 0.5))
    second.learn(dict.fromkeys(arms, 0.5 + 0.0004))
    assert first.state_dict() == second.state_dict()


def test_nan_reward_is_named_and_not_learnt():
    mixer = schedule(max_bad_rewards=1)
    arms = mixer.deal()
    complaints = mixer.learn({arm: float("nan") if arm == arms[0] else 1.0 for arm in arms})
    assert complaints == [f"step 0: the reward of arm `{ARMS[arms[0]]}` is nan"]
    assert mixer.policy.state_dict()["cumulative_reward"][arms[0]] == 0
    assert mixer.take_decisions()[0].reward is None
    arms = mixer.deal()
    with pytest.raises(DivergedError, match=r"step 1: .*is inf; 2 rewards"):
        mixer.learn({arms[0]: float("inf")})


@pytest.mark.parametrize(
    ("arms", "message"), [(["a"], "1 arm"), (["a", "b", "a"], r"one name: \['a'\]")]
)
def test_arms_that_cannot_be_mixed(arms, message):
    with pytest.raises(SpecError, match=message):
        DrawSchedule(Exp3(3, accumulation=G), arms, accumulation=G, seed=0)


def test_checkpoint_with_other_arms():
    state = schedule().state_dict() | {"arms": ["sea", "law", "code", "tea"]}
    with pytest.raises(SpecError, match=r"gone from the spec: \['tea'\], new: \['food'\]"):
        schedule().load_state_dict(state)
