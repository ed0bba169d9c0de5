from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from trajectory_vectors import relative_error, two_workers

from stillhouse.distillation.experts import ExpertOptions, train_expert
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.matcher import Matcher, MatchOptions, StartWindow
from stillhouse.distillation.trajectory import SyntheticSet
from stillhouse.errors import DivergedError, SpecError
from stillhouse.models.convnet import ConvNet
from stillhouse.models.seeded import initialised


def network():
    """Each worker's own: a module is called by one thread at a time."""
    shape = {"num_channels": 1, "image_size": 8, "num_classes": 2, "depth": 1, "width": 4}
    return FlatModule(initialised(lambda: ConvNet(**shape), 0))


MTT = MatchOptions(
    window=StartWindow(0, 2),
    num_steps=4,
    expert_epochs=2,
    batch_size=3,
    augmentation=("flip", "crop"),
    image_rate=20.0,
    step_size_rate=1e-3,
)
AST = replace(
    MTT,
    momentum=0.9,
    balanced=True,
    perturbed=True,
    intermediate=True,
    graded=True,
    image_rate=2.0,
    step_size_rate=1e-5,
)
DATM = replace(MTT, window=StartWindow(0, 2, 1, 3), max_loss=2.0, image_average=0.9, label_rate=1.0)


def stripes(count, seed):
    """Class 0: horizontal stripes, class 1: vertical, both in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    wave = torch.tensor([1.0, -1.0]).repeat(4)
    images = torch.stack([(wave[:, None] if y == 0 else wave).expand(8, 8) for y in labels])
    return (images + torch.randn(count, 8, 8, generator=generator))[:, None], labels


@pytest.fixture(scope="module")
def expert():
    images, labels = stripes(64, 1)
    options = ExpertOptions(num_epochs=4, batch_size=8, learning_rate=0.05, augmentation=("flip",))
    snapshots = list(
        train_expert(network(), images, labels, options, torch.Generator().manual_seed(2))
    )
    assert [snapshot.epoch for snapshot in snapshots] == [0, 1, 2, 3, 4]
    assert snapshots[4].loss < snapshots[1].loss
    return [snapshot.parameters for snapshot in snapshots]


def new_matcher(options, **workers):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(4, 1, 8, 8, generator=generator)
    hard = torch.tensor([0, 1, 0, 1])
    labels = 4 * torch.nn.functional.one_hot(hard).float() if options is DATM else hard
    synthetic = SyntheticSet(images, labels, torch.tensor(0.05))
    return Matcher(network(), synthetic, options, generator, **workers)


def learned(matcher):
    now = matcher.averaged
    return [now.images, now.labels, now.learning_rate, matcher.synthetic.images]


@pytest.mark.parametrize("options", [MTT, AST, DATM], ids=["mtt", "ast", "datm"])
def test_resume_at_any_iteration_gives_the_same_bits(options, expert):
    states, matcher = [], new_matcher(options)
    for _ in range(4):
        states.append({name: value.clone() for name, value in matcher.state_dict().items()})
        matcher.step(expert.__getitem__)
    for done, state in enumerate(states):
        resumed = new_matcher(options)
        resumed.load_state_dict(state)
        for _ in range(done, 4):
            resumed.step(expert.__getitem__)
        pairs = zip(learned(resumed), learned(matcher), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("options", [MTT, AST, DATM], ids=["mtt", "ast", "datm"])
def test_the_set_learns_to_follow_the_expert(options, expert):
    matcher = new_matcher(replace(options, window=StartWindow(0, 1), augmentation=()))
    losses = [sum(matcher.step(expert.__getitem__).terms.values()) for _ in range(12)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_two_workers_learn_what_one_learns(expert):
    def work(rank, all_reduce):
        matcher = new_matcher(AST, sum_over_workers=all_reduce, rank=rank, num_workers=2)
        for _ in range(3):
            matcher.step(expert.__getitem__)
        return learned(matcher)

    first, second = two_workers(work)
    alone = new_matcher(AST)
    for _ in range(3):
        alone.step(expert.__getitem__)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    start = new_matcher(AST).synthetic.images
    assert relative_error(first[0] - start, alone.synthetic.images - start) < 1e-4
    assert first[2].item() == pytest.approx(alone.synthetic.learning_rate.item(), rel=1e-5)


def test_a_segment_without_a_finite_loss_stops_or_is_skipped(expert):
    same_everywhere = [expert[0]] * 5
    matcher = new_matcher(MTT)
    before = matcher.synthetic.images.clone()
    with pytest.raises(DivergedError, match=r"iteration 1: .* from epoch .*`method.max_loss`"):
        matcher.step(same_everywhere.__getitem__)
    assert torch.equal(matcher.synthetic.images, before)
    skipping = new_matcher(replace(MTT, max_loss=1.0))
    assert skipping.step(same_everywhere.__getitem__).skipped
    assert torch.equal(skipping.synthetic.images, before)


def test_a_learned_rate_halves_or_doubles_at_most(expert):
    matcher = new_matcher(replace(MTT, step_size_rate=1e6))
    rates = [matcher.synthetic.learning_rate.item()]
    for _ in range(3):
        matcher.step(expert.__getitem__)
        rates.append(matcher.synthetic.learning_rate.item())
    assert {now / before for before, now in pairwise(rates)} <= {0.5, 2.0}


def test_datm_learns_labels_and_averages_images(expert):
    matcher = new_matcher(DATM)
    start = matcher.synthetic
    matcher.step(expert.__getitem__)
    now = matcher.synthetic
    assert not torch.equal(now.labels, start.labels)
    torch.testing.assert_close(matcher.averaged.images, 0.9 * start.images + 0.1 * now.images)


def test_window_grows_linearly():
    window = StartWindow(1, 11, grows_from=3, growth_iterations=4)
    assert [window.end(iteration) for iteration in range(6)] == [3, 5, 7, 9, 11, 11]
    generator = torch.Generator().manual_seed(0)
    assert {window.draw(0, generator) for _ in range(40)} == {1, 2}
    assert {window.draw(9, generator) for _ in range(400)} == set(range(1, 11))


@pytest.mark.parametrize(
    ("window", "epochs", "message"),
    [
        (StartWindow(5, 5), 50, r"no start epoch lies in \[5, 5\)"),
        (StartWindow(3, 9, grows_from=2), 50, r"no start epoch lies in \[3, 2\)"),
        (StartWindow(0, 10), 10, r"start epoch 9 and 2 epochs more lead beyond .* 10: "),
    ],
)
def test_windows_outside_the_trajectory_are_refused(window, epochs, message):
    with pytest.raises(SpecError, match=message):
        window.check(epochs, 2)
    StartWindow(0, 9).check(10, 2)
