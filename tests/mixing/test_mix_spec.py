import pytest
from pydantic import ValidationError

from stillhouse.errors import SpecError
from stillhouse.mixing.decisions import write_decisions
from stillhouse.mixing.policy import StepPlan
from stillhouse.mixing.spec import MixSpec, rules_of

CONTRACT = {
    "job": "mix",
    "store": "./store",
    "target": {"path": "tasks/targets.parquet", "where": {"task": "copa"}, "num_shots": 32},
    "auxiliary": {"path": "tasks/auxiliary.parquet", "by": "task"},
    "tokenizer": {"train": {"vocab_size": 4096}},
    "model": {"kind": "encoder_decoder", "hidden_size": 128, "num_layers": 2},
    "policy": {"name": "ucb1", "reward": "aggregate", "sampler": "faithful"},
    "train": {"num_steps": 300, "micro_batch": 8, "accumulation": 8, "learning_rate": 1e-3},
    "controls": ["target_only", "uniform", "uniform_with_target_pass"],
    "seeds": [0, 1, 2],
    "compute": {"trainers": 1},
}


def spec(**changes):
    return MixSpec.model_validate(CONTRACT | changes)


def test_the_contracts_spec_is_one():
    found = spec()
    assert found.policy.name == "ucb1" and found.target_batches == 2 and len(found.sources) == 1
    assert MixSpec.model_validate_json(found.model_dump_json()) == found


def test_a_source_and_a_reference_take_a_run():
    run = {"from": "s3://bucket/runs/r"}
    policy = {"name": "doremi"} | run
    found = spec(auxiliary=run, policy=policy, tokenizer=run, model=run)
    assert found.sources[0].selection == found.policy.from_ == found.model.from_ == run["from"]
    assert found.policy.identity().keys() == {"name", "eta", "smoothing", "size_temperature"}
    assert MixSpec.model_validate_json(found.model_dump_json()) == found


def test_controls_have_the_policys_passes():
    rules = rules_of(spec(controls=["target_only", "uniform", "loss_scaling"]), [40, 4000])
    # the policy's initial pass: 5 batches of the first arm, 125 of the second, 2 of the target
    assert [(r.label, r.slots, r.num_steps) for r in rules] == [
        ("ucb1", 8, 300),
        ("target_only", 0, 313),
        ("uniform", 10, 313),
        ("loss_scaling", 8, 300),
    ]
    assert [r.plan.passes(r.slots) for r in rules] == [10] * 4
    assert rules[1].plan == StepPlan(10) and rules[3].plan.reward == "alignment"


def test_the_second_target_pass_is_paid_for():
    policy = {"name": "exp3", "target_gradient": "after_step"}
    rules = rules_of(spec(policy=policy, controls=["uniform_with_target_pass"]), [40, 40])
    assert [(r.slots, r.plan.passes(r.slots)) for r in rules] == [(8, 12), (10, 12)]


STATIC = {"name": "static", "size_temperature": 0.0}


@pytest.mark.parametrize("control", ["static_alignment", "loss_scaling"])
def test_a_control_has_room_for_a_draw(control, tmp_path):
    """16 shots are two batches of 8: a step of two passes has room for these alone."""
    train = CONTRACT["train"] | {"accumulation": 3}
    rules = rules_of(spec(policy=STATIC, train=train, controls=[control]), [40, 40])
    assert [(r.slots, r.plan.passes(r.slots)) for r in rules] == [(3, 3), (1, 3)]
    said = rf"`{control}` has 2 gradient passes of the target .* a step of `static` has 2 in all"
    full = train | {"accumulation": 2}
    with pytest.raises(ValidationError, match=said):
        spec(policy=STATIC, train=full, controls=[control])
    # what a step of a replayed run contained is known from its log alone
    regime = {"policy": "static", "seed": 0, "weighted": False, "slots": 2, "micro_batch": 8}
    log = write_decisions([], ["a", "b"], regime | {"target_batches": 0})
    (tmp_path / "00000000.parquet").write_bytes(log)
    replay = spec(policy={"name": "replay", "log": str(tmp_path)}, train=full, controls=[control])
    with pytest.raises(SpecError, match=r"a step of `replay` has 2 in all"):
        rules_of(replay, [40, 40])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auxiliary": {"path": "a", "selection": "b"}}, "either `path` or `selection`"),
        ({"auxiliary": {"from": "a", "selection": "b"}}, "they are the same"),
        ({"auxiliary": {"path": "a", "by": "task", "name": "b"}}, "drop `name`"),
        ({"seeds": [1, 1]}, "hold one twice"),
        ({"policy": {"name": "uniform"}}, "is the policy and among the `controls`"),
        ({"policy": {"name": "doremi"}}, "either `policy.path` or `policy.from`"),
        ({"arms": "extend"}, "other arms trains from the beginning"),
    ],
)
def test_what_does_not_fit_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        spec(**changes)
