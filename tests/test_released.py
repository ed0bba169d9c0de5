"""Variants that public codes have and we compare with (`benchmarks/`), against their numbers."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from vector_cases import VECTORS, cases

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import released_confidence as released
from released_samplers import ReleasedExp3

SAMPLED = json.loads((VECTORS / "flad_04_released_sampler.json").read_text())["cases"]


def close(loss, at, value, gradient=None):
    """Of a loss in float32, as the references computed it."""
    point = torch.tensor(at, requires_grad=True)
    found = loss(point)
    assert found.item() == pytest.approx(value, rel=1e-5, abs=1e-6)
    if gradient is not None:
        (slope,) = torch.autograd.grad(found, point)
        torch.testing.assert_close(slope, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("given", "wanted"), cases("w2s_02_eleuther_losses"))
def test_confidence_with_a_buffer(given, wanted):
    weak, earlier = torch.tensor(given["weak_p1"]), torch.tensor(given["buffer_before"])
    weight = given["aux_coef"] * min(1.0, given["step"] / given["warmup_steps"])

    def loss(logits):
        options = {"size": given["buffer_size"], "balanced": given.get("balance_batch", False)}
        return released.buffered_loss(logits, weak, weight, earlier, **options)

    close(loss, given["logits"], wanted["logconf_loss"], wanted["logconf_grad"])
    if "entropy_loss" in wanted:
        logits = given["logits"]
        close(
            lambda z: released.entropy_loss(z, weak, weight),
            logits,
            wanted["entropy_loss"],
            wanted["entropy_grad"],
        )
        windowed = wanted["window_loss_radius_0.15"]
        close(lambda z: released.window_loss(z, weak, 0.15), logits, windowed)
        close(lambda z: released.window_loss(z, weak, 1.0), logits, wanted["xent_loss"])


@pytest.mark.parametrize(("given", "wanted"), cases("w2s_01_openai_losses", "product_loss"))
def test_product_of_probabilities(given, wanted):
    weak = torch.tensor(given["weak_labels"])[:, 1]
    close(
        lambda logits: released.product_loss(logits, weak),
        given["logits"],
        wanted["product_loss"],
        wanted["product_grad"],
    )


class Given(ReleasedExp3):
    """Draws by weights that are its state."""

    def probabilities(self, state):
        return np.array(state["weights"])


@pytest.mark.parametrize("case", SAMPLED)
def test_the_sampler_draws_by_a_softmax_of_what_it_is_handed(case):
    policy, state = Given(name="given"), {"weights": case["inputs"]["weights_given"]}
    draws = 4_000
    found = Counter(policy.play(state, (i + 0.5) / draws) for i in range(draws))
    shares = [found[arm] / draws for arm in range(case["inputs"]["num_arms"])]
    np.testing.assert_allclose(shares, case["outputs"]["distribution"], atol=2 / draws)
