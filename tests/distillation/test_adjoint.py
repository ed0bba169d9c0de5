"""The adjoint against the unrolled gradient, by hand, and over two workers."""

from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_networks import relative_error, two_workers
from unrolled import unrolled

from stillhouse.distillation.adjoint import Descent, FlatModule, adjoint, descend
from stillhouse.distillation.matching import (
    Match,
    SyntheticSet,
    draw_batches,
    inner_loss,
    matching_gradients,
    matching_objective,
)
from stillhouse.models.device import initialised
from stillhouse.models.networks import ConvNet, ResNet18

NORMS = st.sampled_from(["instance", "batch", "none"])


def close(found, expected):
    """Within 1e-5 relative, for gradients that are not zero."""
    return float((found - expected).norm()) < 1e-5 * float(expected.norm()) + 1e-13


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    norm=NORMS,
    resnet=st.booleans(),
    soft=st.booleans(),
    rate=st.floats(0.001, 0.05),
    num_steps=st.integers(1, 8),
    batch_size=st.integers(3, 6),
    groups=st.sampled_from([(), ("color", "scale")]),
    momentum=st.sampled_from([0.0, 0.9]),
    scale=st.sampled_from([1.0, 0.6]),
)
def test_adjoint_is_the_unrolled_gradient(
    seed, norm, resnet, soft, rate, num_steps, batch_size, groups, momentum, scale
):
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    shape = {"num_channels": 1 + 2 * (seed % 2), "num_classes": 3, "width": 2, "norm": norm}
    side = 16 if resnet else 8  # so that no instance norm sees a single pixel, which it blinds
    convnet = partial(ConvNet, **shape, image_size=8, depth=1 + seed % 2)
    module = initialised(partial(ResNet18, **shape) if resnet else convnet, seed)
    network = FlatModule(module.double())
    images = random(6, shape["num_channels"], side, side, requires_grad=True)
    labels = random(6, 3, requires_grad=True) if soft else torch.tensor([0, 1, 2, 0, 1, 2])
    synthetic = SyntheticSet(images, labels, torch.tensor(rate, dtype=torch.float64))
    batches = draw_batches(6, batch_size, num_steps, side, groups, generator)
    start = network.parameters() + 0.02 * random(network.num_parameters)
    matches = [Match(num_steps, start + 0.1 * random(len(start)))]
    if num_steps > 1:
        matches.append(Match(num_steps // 2, start + 0.1 * random(len(start)), 0.5))

    found, run = matching_gradients(
        network, synthetic, batches, start, matches, momentum=momentum, loss_scale=scale
    )
    loss = inner_loss(network, synthetic, batches, scale)
    descent = Descent(loss, synthetic.learning_rate, momentum)
    objective = matching_objective(start, matches)
    leaves = [images, labels] if soft else [images]
    expected = unrolled(descent, start, num_steps, objective, leaves)
    assume(expected.leaves[0].norm() < 1e3)  # a chaotic run has no digits to compare
    assert found.objective.item() == pytest.approx(expected.objective.item(), rel=1e-10)
    assert close(found.leaves[0], expected.leaves[0])
    assert close(found.learning_rate, expected.learning_rate)
    assert not soft or close(found.leaves[1], expected.leaves[1])
    assert close(adjoint(descent, run.states, objective, leaves).start, expected.start)


def quadratic(curvature, pull):
    """loss_n = curvature/2 theta^2 + z theta: everything can be had by hand."""
    return lambda step, theta: (0.5 * curvature * theta**2 + pull * theta).sum()


def test_two_steps_by_hand():
    """theta_2 = (1 - 2 eta)^2 theta_0 - eta z (2 - 2 eta), J = theta_2, curvature 2, eta 0.25."""
    pull = torch.tensor([3.0], requires_grad=True)
    descent = Descent(quadratic(2.0, pull), torch.tensor(0.25))
    run = descend(descent, torch.tensor([4.0]), 2)
    assert [state.item() for state in run.states] == [4.0, 1.25, -0.125]
    assert run.losses.tolist() == [28.0, 5.3125]
    found = adjoint(descent, run.states, lambda n, theta: theta.sum() if n == 2 else None, [pull])
    assert found.objective.item() == -0.125
    assert found.leaves[0].tolist() == [-0.375]
    assert found.learning_rate.item() == pytest.approx(-4 * 0.5 * 4 - 3 * (2 - 4 * 0.25))
    assert found.start.tolist() == [0.25]
    first_order = adjoint(
        descent,
        run.states,
        lambda n, theta: theta.sum() if n == 2 else None,
        [pull],
        first_order=True,
    )
    assert first_order.leaves[0].tolist() == [-0.5]


def test_every_step_is_visited_from_the_last_with_its_weight():
    pull = torch.tensor([3.0], requires_grad=True)
    descent, seen = Descent(quadratic(2.0, pull), torch.tensor(0.25)), []
    states = descend(descent, torch.tensor([4.0]), 2).states
    adjoint(
        descent,
        states,
        lambda n, theta: theta.sum(),
        [pull],
        visit=lambda n, theta, weight: seen.append([n, theta.item(), weight.item()]),
    )
    assert seen == [[1, 1.25, 1.0], [0, 4.0, 1.5]]


def workers_problem():
    """One worker's own network, and a set, batches and matches that all workers share."""
    shape = {"num_channels": 1, "image_size": 8, "num_classes": 2, "depth": 1, "width": 2}
    network = FlatModule(initialised(lambda: ConvNet(**shape), 0))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(7, 1, 8, 8, generator=generator)
    synthetic = SyntheticSet(images, torch.arange(7) % 2, torch.tensor(0.1))
    batches = draw_batches(7, 7, 3, 8, ("color", "rotate"), generator)
    return network, synthetic, batches, network.parameters()


def test_gradients_of_workers_add_up():
    """Two threads that really exchange their sums, against one worker."""
    network, synthetic, batches, start = workers_problem()
    matches = [Match(3, start + 0.1)]
    whole, _ = matching_gradients(network, synthetic, batches, start, matches, momentum=0.9)

    def work(rank, all_reduce):
        own, synthetic, batches, start = workers_problem()
        parts = [batch.part(rank, 2) for batch in batches]
        return matching_gradients(
            own, synthetic, parts, start, matches, momentum=0.9, all_reduce=all_reduce
        )

    (first, run), (second, other) = two_workers(work)
    assert torch.equal(run.states[-1], other.states[-1])
    assert relative_error(first.leaves[0] + second.leaves[0], whole.leaves[0]) < 1e-5
    assert relative_error(first.learning_rate, whole.learning_rate) < 1e-5
