"""The published codes' traces, reproduced: FLAD, ODM and DoReMi."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.mixing.doremi import DoReMi
from stillhouse.mixing.exp3 import Exp3
from stillhouse.mixing.odm import Odm
from stillhouse.mixing.open_step import collect
from stillhouse.mixing.rewards import Aim
from stillhouse.mixing.task_loss import clipped_excess
from stillhouse.mixing.ucb1 import Ucb1

NAMES = {"cosine": "alignment", "magnitude": "magnitude", "cosine_and_magnitude": "aggregate"}


def vector(name):
    return json.loads((Path(__file__).parents[1] / "vectors" / f"{name}.json").read_text())


def cases(name):
    return vector(name)["cases"]


def step_rewards(inputs, step):
    """{arm: reward} of one window, from the vectors' gradients."""
    size = inputs["grad_accumulation"]
    window = slice(step * size, (step + 1) * size)
    gradients = {}
    for arm, gradient in zip(
        inputs["arm_per_microbatch"][window], inputs["aux_grad_per_microbatch"][window], strict=True
    ):
        gradients.setdefault(arm, []).append(gradient)
    aim = Aim.of(torch.tensor(inputs["target_grad_per_step"][step]))
    name = NAMES[inputs["reward"]]
    return {arm: aim.products(torch.tensor(g).mean(0)).reward(name) for arm, g in gradients.items()}


@pytest.mark.parametrize("case", cases("flad_01_rewards"), ids=lambda case: case["description"])
def test_rewards(case):
    target, arm = (torch.tensor(case["inputs"][key]) for key in ("target_grad", "aux_grad"))
    found = Aim.of(target).products(arm)
    got = {key: found.reward(name) for key, name in NAMES.items()}
    assert got == pytest.approx(case["outputs"], rel=0, abs=2e-6)


@pytest.mark.parametrize("case", cases("flad_02_exp3_trace"))
def test_exp3(case):
    inputs = case["inputs"]
    same = {
        "num_arms": inputs["num_arms"],
        "accumulation": inputs["grad_accumulation"],
        "smoothing": inputs["beta"],
        "speed": 10,
    }
    policy = Exp3(**same)
    for step, expected in enumerate(case["outputs"]["trace"]):
        if step > 0:
            policy.update(step_rewards(inputs, step - 1))
            state = policy.state_dict()
            close(state["mean_reward"], expected["rewards"])
            close(state["cumulative_reward"], expected["cumulative_reward"])
        assert policy.exploration_rate(step) == pytest.approx(expected["eps"], rel=1e-12)
        close(policy.probabilities(), expected["probabilities"])


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("case", cases("flad_03_ucb1_trace"))
def test_ucb1(case):
    inputs, trace = case["inputs"], case["outputs"]["trace"]
    size = inputs["grad_accumulation"]
    policy = Ucb1(inputs["initial_mean_reward"], smoothing=inputs["beta"])
    compare_ucb1(policy, trace[0])
    for number, expected in enumerate(trace[1:], start=1):
        policy.count(expected["drawn_arm"])
        if number % size == 0:
            policy.update(step_rewards(inputs, number // size - 1))
        state = policy.state_dict()
        assert state["counts"] == expected["counts"]
        close(state["mean_reward"], expected["mean_reward"])
        compare_ucb1(policy, expected)


def compare_ucb1(policy, expected):
    """The published code counts other rounds than it means to at some steps."""
    state, meant = policy.state_dict(), expected.get("rounds_intended")
    if expected.get("rounds_used") == meant:
        close(policy.indices(), expected["index"])
        assert int(np.argmax(policy.indices())) == expected["argmax"]
    else:
        bonus = np.sqrt(2 * np.log(meant) / np.array(state["counts"]))
        close(policy.indices(), np.array(state["mean_reward"]) + bonus)
    law = policy.probabilities()
    assert sorted(law)[-2:] == [0, 1] and law[np.argmax(policy.indices())] == 1


def test_odm():
    case = vector("odm_01_updaters")["paper_formula"]
    inputs = case["inputs"]
    policy = Odm(
        inputs["initial_weights"],
        smoothing=inputs.get("smoothing_factor", 0.9),
        warmup_steps=inputs.get("warmup_steps", 0),
    )
    for losses, expected in zip(inputs["losses"], case["outputs"]["trace"], strict=True):
        if "domain" in losses:
            losses = {losses["domain"]: losses["loss"]}
        policy.update({int(name.removeprefix("dom")): loss for name, loss in losses.items()})
        wanted = expected.get("estimated_reward") or expected["cumulative_estimated_reward"]
        assert policy.state_dict()["estimate"] == pytest.approx(wanted, rel=1e-9)
        assert policy.probabilities().tolist() == pytest.approx(expected["probabilities"], rel=1e-9)


def excess_rows(step):
    """Each sequence as a micro-batch, as a step of the trainer sums it."""
    rows = []
    for i, domain in enumerate(step["domain_ids"]):
        mask = torch.tensor(step["token_mask"][i])
        excess = torch.tensor(step["excess_loss"][i]) * mask
        tokens = int(mask.sum())
        total = float(clipped_excess(excess, torch.zeros_like(excess)))
        rows.append((domain, i, 1.0, tokens, total, tokens))
    return rows


@pytest.mark.parametrize("case", cases("doremi_01_domain_weights"))
def test_doremi(case):
    inputs = case["inputs"]
    policy = DoReMi(
        inputs["initial_weights"],
        eta=inputs["eta"],
        smoothing=inputs["smoothing"],
        initial_excess=np.log(inputs["vocab_size"]),
    )
    for step, expected in zip(inputs["steps"], case["outputs"]["trace"], strict=True):
        policy.update(collect(excess_rows(step), "excess", {}).rewards)
        near = {"rtol": 0, "atol": 5e-6}
        np.testing.assert_allclose(policy.excess, expected["perdomain_scores"], **near)
        np.testing.assert_allclose(policy.weights, expected["domain_weights"], **near)
        np.testing.assert_allclose(policy.average, expected["avg_domain_weights"], **near)
