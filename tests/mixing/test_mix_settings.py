import pytest
from pydantic import TypeAdapter, ValidationError

from stillhouse.errors import SpecError
from stillhouse.mixing.decisions import Decision, write_decisions
from stillhouse.mixing.policy import MixFacts
from stillhouse.mixing.settings import NamedPolicy

FACTS = MixFacts(
    arms=["a", "b"],
    accumulation=4,
    sizes=[1, 3],
    initial_rewards=[0.0, 0.5],
)
ADAPTER = TypeAdapter(NamedPolicy)


@pytest.mark.parametrize(
    ("given", "law", "initial_pass"),
    [
        ({"name": "exp3"}, [0.5, 0.5], False),
        ({"name": "exp3", "initial_pass": True}, [0.5, 0.5], True),
        ({"name": "ucb1", "reward": "aggregate"}, [0, 1], True),
        ({"name": "odm"}, [0.25, 0.75], False),
        ({"name": "doremi"}, [0.5, 0.5], False),
        ({"name": "doremi", "size_temperature": 1}, [0.25, 0.75], False),
        ({"name": "static", "weights": {"b": 2}}, [0, 1], False),
        ({"name": "static", "size_temperature": 2}, [0.1, 0.9], False),
        ({"name": "static", "alignment_temperature": 0.5}, [0.268941, 0.731059], True),
        ({"name": "uniform"}, [0.5, 0.5], False),
    ],
)
def test_policy_of_settings(given, law, initial_pass):
    settings = ADAPTER.validate_python(given)
    policy = settings.make(FACTS)
    assert policy.probabilities().tolist() == pytest.approx(law, abs=1e-6)
    assert settings.needs_initial_pass == initial_pass


def test_replay_begins_with_the_first_decision_of_a_log(tmp_path):
    regime = {"seed": 0, "slots": 4, "micro_batch": 2, "target_batches": 3, "weighted": False}
    part = write_decisions([Decision(0, 0, 0.1, 1)], ["a", "b"], {**regime, "policy": "ucb1"})
    (tmp_path / "00000001.parquet").write_bytes(part)
    settings = ADAPTER.validate_python({"name": "replay", "log": str(tmp_path)})
    settings.check(4, 2)
    assert settings.plan(1).target_batches == 3
    assert settings.make(FACTS).probabilities().tolist() == [0, 1]
    with pytest.raises(SpecError, match=r"`train.accumulation: 4`, not 5"):
        settings.check(5, 2)
    with pytest.raises(SpecError, match=r"is of seed 0: set `seeds: \[0\]`"):
        settings.make(MixFacts(arms=["a", "b"], accumulation=4, seed=1))


@pytest.mark.parametrize(
    "given",
    [
        {"name": "exp4"},
        {"name": "ucb1", "sampler": "released"},
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
        settings.make(FACTS)
