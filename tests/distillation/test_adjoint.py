import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectory_vectors import relative_error

from stillhouse.distillation.adjoint import Descent, adjoint, descend, unrolled
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.trajectory import (
    Batch,
    InnerLoss,
    Match,
    SyntheticSet,
    draw_batches,
    matching_gradients,
    matching_objective,
)
from stillhouse.models.convnet import ConvNet, initialised
from stillhouse.models.resnet import ResNet18

NORMS = st.sampled_from(["instance", "batch", "none"])


@st.composite
def problems(draw):
    """A small network in float64, a synthetic set, batches and two matches."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    norm, channels, width = draw(NORMS), draw(st.sampled_from([1, 3])), draw(st.integers(2, 3))
    if draw(st.booleans()):
        shape = {"image_size": 8, "depth": draw(st.integers(1, 2))}
        module = ConvNet(num_channels=channels, num_classes=3, width=width, norm=norm, **shape)
    else:
        module = ResNet18(num_channels=channels, num_classes=3, width=2, norm=norm)
    network = FlatModule(module.double())
    labels = random(6, 3) if draw(st.booleans()) else torch.tensor([0, 1, 2, 0, 1, 2])
    rate = torch.tensor(draw(st.floats(0.001, 0.1)), dtype=torch.float64)
    synthetic = SyntheticSet(random(6, channels, 8, 8), labels, rate)
    num_steps, groups = draw(st.integers(1, 8)), draw(st.sampled_from([(), ("color", "scale")]))
    batches = draw_batches(6, draw(st.integers(3, 6)), num_steps, 8, groups, generator)
    start = 0.3 * random(network.num_parameters)
    targets = [start + 0.1 * random(network.num_parameters) for _ in range(2)]
    matches = [Match(num_steps, targets[0])]
    if num_steps > 1:
        matches.append(Match(num_steps // 2, targets[1], 0.5))
    return network, synthetic, batches, start, matches


@settings(max_examples=15, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.9]), st.sampled_from([1.0, 0.6]))
def test_adjoint_is_the_unrolled_gradient(problem, momentum, scale):
    network, synthetic, batches, start, matches = problem
    found = matching_gradients(*problem, momentum=momentum, loss_scale=scale)
    images = synthetic.images.clone().requires_grad_()
    labels = synthetic.labels.clone().requires_grad_(synthetic.soft)
    given_set = SyntheticSet(images, labels, synthetic.learning_rate)
    descent = Descent(
        InnerLoss(network, given_set, batches, scale), synthetic.learning_rate, momentum
    )
    objective = matching_objective(start, matches)
    leaves = [images, labels] if synthetic.soft else [images]
    expected = unrolled(descent, start, len(batches), objective, leaves)
    assert found.loss.item() == pytest.approx(expected.objective.item(), rel=1e-10)
    assert relative_error(found.images, expected.leaves[0]) < 1e-5
    assert relative_error(found.learning_rate, expected.learning_rate) < 1e-5
    if synthetic.soft:
        assert relative_error(found.labels, expected.leaves[1]) < 1e-5
    again = adjoint(descent, found.run.states, objective, leaves)
    assert relative_error(again.start, expected.start) < 1e-5


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


def test_momentum_by_hand():
    """Without curvature: v = z, z (1 + mu), so that theta_2 = theta_0 - eta z (2 + mu)."""
    pull = torch.tensor([3.0], requires_grad=True)
    descent = Descent(quadratic(0.0, pull), torch.tensor(0.5), momentum=0.5)
    run = descend(descent, torch.tensor([1.0]), 2)
    assert run.states[-1].item() == 1 - 0.5 * 3 * 2.5
    found = adjoint(descent, run.states, lambda n, theta: theta.sum() if n == 2 else None, [pull])
    assert found.leaves[0].tolist() == [-1.25]
    assert found.learning_rate.item() == -7.5


def test_every_step_is_visited_from_the_last_with_its_weight():
    pull = torch.tensor([3.0], requires_grad=True)
    descent, seen = Descent(quadratic(2.0, pull), torch.tensor(0.25)), []
    states = descend(descent, torch.tensor([4.0]), 2).states
    adjoint(
        descent,
        states,
        lambda n, theta: theta.sum(),
        [pull],
        visit=lambda *step: seen.append(
            [value if isinstance(value, int) else value.item() for value in step]
        ),
    )
    assert seen == [[1, 1.25, 1.0], [0, 4.0, 1.5]]


def test_workers_shares_add_up():
    """Three workers, their all-reduce played by computing every part in place of one."""
    network = FlatModule(
        initialised(
            lambda: ConvNet(num_channels=1, image_size=8, num_classes=2, depth=1, width=2), 0
        )
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(7, 1, 8, 8, generator=generator, requires_grad=True)
    synthetic = SyntheticSet(images, torch.arange(7) % 2, torch.tensor(0.1))
    batches = draw_batches(7, 7, 2, 8, ("color", "crop"), generator)
    theta = network.parameters()
    whole = InnerLoss(network, synthetic, batches)(0, theta)
    parts = [[batch.part(rank, 3) for batch in batches] for rank in range(3)]
    assert [len(part[0].rows) for part in parts] == [2, 2, 3]
    shares = [InnerLoss(network, synthetic, part)(0, theta) for part in parts]
    assert torch.stack(shares).sum().item() == pytest.approx(whole.item(), rel=1e-6)


def test_gradients_of_workers_add_up():
    """Two threads that really exchange their sums, against one worker."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    network = FlatModule(
        initialised(
            lambda: ConvNet(num_channels=1, image_size=8, num_classes=2, depth=1, width=2), 0
        )
    )
    generator = torch.Generator().manual_seed(1)
    synthetic = SyntheticSet(
        torch.randn(5, 1, 8, 8, generator=generator), torch.arange(5) % 2, torch.tensor(0.1)
    )
    batches = draw_batches(5, 5, 3, 8, ("color", "rotate"), generator)
    start = network.parameters()
    matches = [Match(3, start + 0.1)]
    whole = matching_gradients(network, synthetic, batches, start, matches, momentum=0.9)
    barrier, given_parts = Barrier(2), {}

    def work(rank):
        def all_reduce(tensor):
            given_parts[rank] = tensor
            barrier.wait(timeout=10)
            total = given_parts[0] + given_parts[1]
            barrier.wait(timeout=10)
            return total

        own = [batch.part(rank, 2) for batch in batches]
        return matching_gradients(
            network, synthetic, own, start, matches, momentum=0.9, all_reduce=all_reduce
        )

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(work, range(2))
    assert torch.equal(first.run.states[-1], second.run.states[-1])
    assert relative_error(first.images + second.images, whole.images) < 1e-5
    assert relative_error(first.learning_rate, whole.learning_rate) < 1e-5
