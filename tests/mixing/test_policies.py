import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import InputError
from stillhouse.mixing.decisions import Decision
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.exp3 import Exp3
from stillhouse.mixing.loss_scaling import LossScaling
from stillhouse.mixing.odm import Odm
from stillhouse.mixing.policy import invert
from stillhouse.mixing.replay import Replay
from stillhouse.mixing.static import Static, by_alignment, by_size
from stillhouse.mixing.ucb1 import Ucb1

G = 3


MAKERS = {
    "exp3": lambda k: Exp3(k, accumulation=G),
    "exp3_fast": lambda k: Exp3(k, accumulation=G, speed=10, smoothing=0.5),
    "ucb1": lambda k: Ucb1(np.linspace(0, 1, k)),
    "loss_scaling": lambda k: LossScaling(np.linspace(0, 1, k)),
    "odm": lambda k: Odm(np.ones(k), warmup_steps=1),
    "doremi": lambda k: DoReMi(np.arange(1, k + 1)),
    "static": lambda k: Static(np.arange(k)),
}


def steps(policy, rng, num_steps, negative=True):
    """Play steps against a noisy world; the arms that were played."""
    played = []
    for _ in range(num_steps):
        window = [policy.draw(rng) for _ in range(G)]
        low = -1 if negative else 0
        policy.update({arm: float(rng.uniform(low, 2)) for arm in sorted(set(window))})
        played += window
    return played


@pytest.mark.parametrize("name", MAKERS)
@settings(deadline=None, max_examples=25)
@given(k=st.integers(2, 40), num_steps=st.integers(0, 20), seed=st.integers(0, 99))
def test_law_is_a_law_and_the_same_after_a_restart(name, k, num_steps, seed):
    policy, rng = MAKERS[name](k), np.random.default_rng(seed)
    steps(policy, rng, num_steps, negative=not name.startswith(("odm", "doremi")))
    law = policy.probabilities()
    assert law.dtype == np.float64 and law.shape == (k,)
    assert np.all(law >= 0) and law.sum() == pytest.approx(1, abs=1e-12)
    restored = MAKERS[name](k)
    state = policy.state_dict()
    restored.load_state_dict(json.loads(json.dumps(state)))
    assert restored.state_dict() == state
    first, second = np.random.default_rng(seed + 1), np.random.default_rng(seed + 1)
    assert steps(policy, first, 3, negative=False) == steps(restored, second, 3, negative=False)
    assert policy.state_dict() == restored.state_dict()


@settings(deadline=None, max_examples=50)
@given(
    k=st.integers(2, 60),
    rewards=st.lists(st.dictionaries(st.integers(0, 1), st.floats(-50, 50)), max_size=40),
)
def test_exp3_never_falls_below_its_floor(k, rewards):
    policy = Exp3(k, accumulation=G)
    for step, window in enumerate(rewards, start=1):
        policy.update(window)
        rate = policy.exploration_rate(step)
        assert policy.probabilities().min() >= rate * (1 - 1e-9)
        assert 0 < rate <= policy.exploration_rate(step - 1) <= 1 / k


def test_exploration_follows_the_paper():
    policy = Exp3(20, accumulation=8)
    assert policy.exploration_rate(0) == policy.exploration_rate(1) == 0.05  # still 1 / K
    assert policy.exploration_rate(300) == pytest.approx((np.log(20) / (20 * 2401)) ** 0.5)


@settings(max_examples=200)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-300, 0.1, 1.0, 7.0]), min_size=1).filter(any),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_an_arm_of_mass_zero_is_never_drawn(weights, uniform):
    law = np.array(weights) / np.sum(weights)
    assert law[invert(law, uniform)] > 0


def test_inverse_of_the_cumulative_law():
    law = np.array([0.25, 0.0, 0.5, 0.25])
    drawn = [invert(law, uniform) for uniform in (0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)]
    assert drawn == [0, 0, 2, 2, 3, 3]


def test_draws_follow_the_law():
    rng = np.random.default_rng(0)
    policy = Static([1, 2, 5])
    counts = np.bincount([policy.draw(rng) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.125, 0.25, 0.625], atol=0.02)


@pytest.mark.parametrize(("name", "share"), [("exp3", 0.35), ("exp3_fast", 0.2), ("ucb1", 0.45)])
def test_bandits_find_two_good_arms_of_twenty(name, share):
    good, makers = (
        [0.35] * 2 + [0.05] * 18,
        {
            "exp3": lambda: Exp3(20, accumulation=8),
            "exp3_fast": lambda: Exp3(20, accumulation=8, speed=10),
            "ucb1": lambda: Ucb1(good),
        },
    )
    policy, rng = makers[name](), np.random.default_rng(0)
    late = []
    for step in range(300):
        window = [policy.draw(rng) for _ in range(8)]
        policy.update({arm: good[arm] + 0.15 * rng.standard_normal() for arm in sorted({*window})})
        late += window if step >= 225 else []
    assert np.mean(np.array(late) < 2) > share


def test_ucb1_plays_within_a_window_by_counts_alone():
    policy = Ucb1([0.5, 0.4, -1.0])
    # sqrt(2 ln 3) = 1.48; after a play of arm 0: 0.5 + sqrt(2 ln 4 / 2) = 1.68 < 0.4 + 1.67
    assert [policy.play(0.0) for _ in range(3)] == [0, 1, 0]


def test_odm_waits_at_the_initial_weights():
    policy = Odm([3, 1], warmup_steps=2)
    for _ in range(2):
        policy.update({0: 9.0})
    assert policy.probabilities().tolist() == [0.75, 0.25]
    assert policy.state_dict()["estimate"] == [0, 0]


def test_doremi_weighs_losses_but_draws_by_the_reference():
    policy = DoReMi([3, 1], smoothing=0)
    policy.update({1: float(np.log(3))})  # w = (3, 1 * 3) / 6
    assert policy.weights.tolist() == pytest.approx([0.5, 0.5])
    assert policy.probabilities().tolist() == [0.75, 0.25]
    # u = w / q = 2/3 and 2: of three micro-batches the mean of u is 10/9
    assert policy.loss_weights([0, 1, 0]).tolist() == pytest.approx([0.6, 1.8])
    assert policy.loss_weights([1, 1]).tolist() == pytest.approx([1 / 3, 1])
    assert policy.average.tolist() == pytest.approx([0.625, 0.375])


def test_static_laws():
    assert by_size([1, 4, 16], 0.5).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert by_size([1, 4], 0).tolist() == [0.5, 0.5]
    alignment = [0.0, np.log(2) / 10]
    assert by_alignment(alignment, 0.1).tolist() == pytest.approx([1 / 3, 2 / 3])


def test_replay_plays_the_log_and_stops_at_its_end():
    log = [Decision(0, slot, 0.5, arm) for slot, arm in enumerate([2, 0, 2])]
    policy = Replay(log, ["a", "b", "c"], ["a", "b", "c"])
    assert policy.probabilities().tolist() == [0, 0, 1]
    assert policy.play(0.9) == 2
    state = policy.state_dict()
    assert [policy.play(0.9), policy.play(0.9)] == [0, 2]
    with pytest.raises(InputError, match="ends after 3 micro-batches"):
        policy.play(0.9)
    policy.load_state_dict(state)
    assert policy.play(0.9) == 0


def test_replay_wants_the_same_arms():
    with pytest.raises(InputError, match=r"differ: \['b', 'c'\]"):
        Replay([], ["a", "b"], ["a", "c"])
    with pytest.raises(InputError, match="only in their order"):
        Replay([], ["a", "b"], ["b", "a"])


def test_loss_scaling_draws_alike_and_weighs_by_reward():
    policy = LossScaling([0.5, -0.2, 1.0], smoothing=0.5)
    assert policy.probabilities().tolist() == [1 / 3] * 3
    assert policy.loss_weights([0]).tolist() == pytest.approx([0.500001, 1e-6, 1.000001])
    policy.update({0: 0.1, 1: 0.6})
    assert policy.loss_weights([0]).tolist() == pytest.approx([0.300001, 0.200001, 1.000001])
