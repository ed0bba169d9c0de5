import numpy as np
import pytest
from mixing_world import write_rows

from stillhouse.errors import SpecError
from stillhouse.mixing.decisions import Decision, among
from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.exp3 import Exp3
from stillhouse.mixing.loss_scaling import LossScaling
from stillhouse.mixing.odm import Odm
from stillhouse.mixing.origins import Origin, choose_origin, run_name, unfinished_runs
from stillhouse.mixing.schedule import DrawSchedule
from stillhouse.mixing.spec import MixSpec
from stillhouse.mixing.ucb1 import Ucb1
from stillhouse.mixing.uniform import Uniform
from stillhouse.pipelines.mix_data import GivenModels, list_sources, open_sources
from stillhouse.pipelines.mix_families import families_of
from stillhouse.storage.artifact import Store

AB = (("a", "part-a"), ("b", "part-b"))
ABC = (*AB, ("c", "part-c"))
OLD = Origin("x" * 64, 40, AB, "words")


@pytest.mark.parametrize(
    ("arms", "rule", "said"),
    [
        (ABC, "same", r"step 40 .*other arms: new: \['c'\]: `arms: extend` may add arms"),
        (AB[:1], "same", r"gone from the spec: \['b'\]"),
        (
            (*AB[:1], ("c", "d")),
            "extend",
            r"gone from the spec: \['b'\], new: \['c'\]: only adding",
        ),
        ((AB[0], ("b", "other")), "extend", r"with other rows: \['b'\]: only adding"),
        (AB[::-1], "same", "in another order"),
    ],
)
def test_other_arms_are_named(arms, rule, said):
    with pytest.raises(SpecError, match=said):
        choose_origin([OLD], arms, rule, "`ucb1`, seed 0,")


def test_a_run_goes_on_from_what_it_only_adds_to():
    other = Origin("y" * 64, 80, (("z", "z"), AB[0]), "words")
    assert choose_origin([other, OLD], ABC, "extend", "r") == OLD
    assert choose_origin([OLD], AB[::-1], "extend", "r") == OLD
    assert choose_origin([OLD], ABC, "fresh", "r") is None
    assert choose_origin([OLD], AB, "same", "r") is None  # its own, under another name
    assert choose_origin([], ABC, "same", "r") is None


def test_specs_that_differ_in_their_arms_alone_are_of_one_lineage(tmp_path):
    paths = [
        {"path": write_rows(tmp_path / f"{n}.parquet", [{"input": n, "target": "b"}]), "name": n}
        for n in "tabc"
    ]
    store = Store(str(tmp_path / "store"))

    def lineages(sources, **changes):
        spec = MixSpec.model_validate(
            {"job": "mix", "target": {"path": paths[0]["path"]}, "auxiliary": sources} | changes
        )
        inputs = open_sources(store, *list_sources(spec), remember=False)
        found = families_of(store, spec, inputs, GivenModels())
        return [found[label, 0].lineage for label in ("ucb1", *spec.controls)]

    controls = {"controls": ["uniform"]}
    fewer, more = lineages(paths[1:3], **controls), lineages(paths[1:], **controls)
    assert fewer == more and fewer[0] != fewer[1]
    assert lineages(paths[1:], arms="extend") == fewer[:1]
    assert lineages(paths[1:], train={"num_steps": 5})[0] != fewer[0]


def test_relatives_are_known_by_half_of_their_names(tmp_path):
    first, second = run_name("a" * 64, "b" * 64), run_name("c" * 64, "b" * 64)
    assert first == "a" * 32 + "b" * 32
    assert unfinished_runs(Store(str(tmp_path)), [first, second], "a" * 64) == []


POLICIES = {
    "exp3": lambda k: Exp3(k, accumulation=2),
    "ucb1": lambda k: Ucb1(np.full(k, 0.5)),
    "odm": lambda k: Odm(np.ones(k)),
    "doremi": lambda k: DoReMi(np.ones(k)),
    "loss_scaling": lambda k: LossScaling(np.full(k, 0.5)),
    "uniform": Uniform,
}


@pytest.mark.parametrize("name", POLICIES)
def test_arms_are_added_to_every_policy(name):
    fewer = DrawSchedule(POLICIES[name](2), ["a", "b"], accumulation=2, seed=3)
    for _ in range(5):
        fewer.learn({arm: 0.25 + 0.5 * arm for arm in fewer.deal()})
    rows = among(fewer.take_decisions(), ["a", "b"], ["b", "c", "a"])
    more = DrawSchedule(POLICIES[name](3), ["b", "c", "a"], accumulation=2, seed=0)
    more.extend_state_dict(fewer.state_dict(), rows)
    assert more.draws == fewer.draws | {"c": 0}
    assert more.policy.probabilities().sum() == pytest.approx(1)
    before, after = fewer.policy.state_dict(), more.policy.state_dict()
    for key, value in before.items():
        if key in ("law", "weights", "average"):  # shares: c has one too
            assert sum(after[key]) == pytest.approx(1) and after[key][1] > 0
            assert after[key][2] / after[key][0] == pytest.approx(value[0] / value[1])
        elif isinstance(value, list):
            assert [after[key][2], after[key][0]] == value
    more.learn(dict.fromkeys(more.deal(), 0.5))
    assert sum(more.draws.values()) == 12


def test_a_new_arm_of_exp3_is_as_likely_as_the_others_on_average():
    fewer = Exp3(2, accumulation=2)
    fewer.update({0: 1.0, 1: 0.0})
    more = Exp3(3, accumulation=2)
    state = more.extended(fewer.state_dict(), [2, 0])
    assert fewer.state_dict()["cumulative_reward"] == [2.0, 0.0]
    assert state["cumulative_reward"] == [0.0, 1.0, 2.0] and state["step"] == 1


def test_decisions_over_more_arms():
    row = Decision(0, 0, 0.5, 1, 0.25, [0.25, 0.75], [1.0, 2.0])
    (moved,) = among([row], ["a", "b"], ["b", "c", "a"])
    assert moved.arm == 0 and moved.reward == 0.25
    assert moved.probabilities == [0.75, 0.0, 0.25]
    assert moved.indices == [2.0, float("-inf"), 1.0]
