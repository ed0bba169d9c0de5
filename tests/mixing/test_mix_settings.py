import pytest
from pydantic import TypeAdapter, ValidationError

from stillhouse.errors import SpecError
from stillhouse.mixing.decisions import Decision
from stillhouse.mixing.settings import MixFacts, PolicySettings, make_policy, needs_initial_pass

FACTS = MixFacts(
    arms=["a", "b"],
    accumulation=4,
    target_batches=3,
    sizes=[1, 3],
    initial_rewards=[0.0, 0.5],
    log=([Decision(0, 0, 0.1, 1)], ["a", "b"]),
)
ADAPTER = TypeAdapter(PolicySettings)


@pytest.mark.parametrize(
    ("given", "law", "initial_pass"),
    [
        ({"name": "exp3"}, [0.5, 0.5], False),
        ({"name": "exp3", "initial_pass": True}, [0.5, 0.5], True),
        ({"name": "ucb1", "reward": "aggregate", "sampler": "faithful"}, [0, 1], True),
        ({"name": "ucb1", "sampler": "released"}, [0.268941, 0.731059], True),
        ({"name": "odm"}, [0.25, 0.75], False),
        ({"name": "doremi"}, [0.5, 0.5], False),
        ({"name": "doremi", "size_temperature": 1}, [0.25, 0.75], False),
        ({"name": "static", "weights": {"b": 2}}, [0, 1], False),
        ({"name": "static", "size_temperature": 2}, [0.1, 0.9], False),
        ({"name": "static", "alignment_temperature": 0.5}, [0.268941, 0.731059], True),
        ({"name": "uniform"}, [0.5, 0.5], False),
        ({"name": "replay", "log": "runs/x/decisions"}, [0, 1], False),
    ],
)
def test_policy_of_settings(given, law, initial_pass):
    settings = ADAPTER.validate_python(given)
    policy = make_policy(settings, FACTS)
    assert policy.probabilities().tolist() == pytest.approx(law, abs=1e-6)
    assert needs_initial_pass(settings) == initial_pass


def test_exploration_speed_is_the_samplers_own_unless_given():
    rates = []
    for given in ({}, {"sampler": "released"}, {"sampler": "released", "exploration_speed": 1}):
        policy = make_policy(ADAPTER.validate_python({"name": "exp3", **given}), FACTS)
        rates.append(policy.exploration_rate(100))
    assert rates[0] == rates[2] == pytest.approx(rates[1] * 10**0.5, rel=0.01)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "exp4"},
        {"name": "uniform", "sampler": "released"},
        {"name": "exp3", "smoothing": 0},
        {"name": "static"},
        {"name": "static", "weights": {"a": 0}},
        {"name": "static", "weights": {"a": 1}, "size_temperature": 1},
        {"name": "replay"},
    ],
)
def test_settings_that_are_refused(given):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(given)


def test_weights_of_an_unknown_arm():
    settings = ADAPTER.validate_python({"name": "static", "weights": {"c": 1}})
    with pytest.raises(SpecError, match=r"\['c'\]"):
        make_policy(settings, FACTS)
