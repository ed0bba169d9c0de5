"""The outer loop of trajectory matching: what it learns, and how it resumes."""

from itertools import pairwise

import pytest
import torch
from small_networks import relative_error, two_workers

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.experts import resolved, train_expert
from stillhouse.distillation.matching import SyntheticSet
from stillhouse.distillation.matching_task import Matcher
from stillhouse.distillation.methods.ast import Ast
from stillhouse.distillation.methods.datm import Datm
from stillhouse.distillation.methods.ftd import Ftd
from stillhouse.distillation.methods.mtt import Mtt
from stillhouse.distillation.spec import ExpertSettings
from stillhouse.errors import DivergedError
from stillhouse.models.device import initialised
from stillhouse.models.networks import ConvNet

GROUPS = ("flip", "crop")
SHARED = {
    "images_per_class": 2,
    "seed": 3,
    "num_steps": 4,
    "expert_epochs": 2,
    "max_start_epoch": 2,
    "batch_size": 3,
    "image_rate": 20.0,
    "step_size_rate": 1e-3,
}
MTT = Mtt(name="mtt", **SHARED)
AST = Ast(name="ast", **SHARED | {"image_rate": 2.0, "step_size_rate": 1e-5})
DATM = Datm(
    name="datm",
    **SHARED,
    first_max_start_epoch=1,
    growth_iterations=3,
    max_loss=2.0,
    label_rate=1.0,
)
FTD = Ftd(name="ftd", **SHARED, image_average=0.9)
METHODS = pytest.mark.parametrize("method", [MTT, AST, DATM, FTD], ids=lambda m: m.name)


def network():
    """Each worker's own: a module is called by one thread at a time."""
    shape = {"num_channels": 1, "image_size": 8, "num_classes": 2, "depth": 1, "width": 4}
    return FlatModule(initialised(lambda: ConvNet(**shape), 0))


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
    settings = resolved(ExpertSettings(epochs=4, batch_size=8, learning_rate=0.05))
    draws, start = torch.Generator().manual_seed(2), network()
    epochs = [*train_expert(start, images, labels, settings, ("flip",), draws)]
    assert len(epochs) == 4 and epochs[3][1] < epochs[0][1]
    return [start.parameters(), *(theta for theta, _ in epochs)]


def matcher_of(method, expert, groups=GROUPS, group=None):
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    hard = torch.tensor([0, 1, 0, 1])
    labels = 4 * torch.nn.functional.one_hot(hard).float() if method.soft_labels else hard
    synthetic = SyntheticSet(images, labels, torch.tensor(0.05))
    return Matcher(network(), synthetic, method, [expert.__getitem__], 4, groups, group)


def learned(matcher):
    now = matcher.averaged
    return [now.images, now.labels, now.learning_rate, matcher.synthetic.images]


@METHODS
def test_resume_at_any_iteration_gives_the_same_bits(method, expert):
    states, matcher = [], matcher_of(method, expert)
    for _ in range(4):
        states.append(matcher.snapshot())
        matcher.step()
    for done, state in enumerate(states):
        resumed = matcher_of(method, expert)
        resumed.restore(state)
        assert [resumed.step().step for _ in range(done, 4)] == [*range(done + 1, 5)]
        pairs = zip(learned(resumed), learned(matcher), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)


@METHODS
def test_the_set_learns_to_follow_the_expert(method, expert):
    changes = {"max_start_epoch": 1, "first_max_start_epoch": 1}
    matcher = matcher_of(method.model_copy(update=changes), expert, groups=())
    losses = [matcher.step().loss for _ in range(12)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


class Pair:
    """One of two workers that are threads."""

    size = 2

    def __init__(self, rank, total):
        self.rank, self.total = rank, total


def test_two_workers_learn_what_one_learns(expert):
    def work(rank, all_reduce):
        matcher = matcher_of(AST, expert, group=Pair(rank, all_reduce))
        for _ in range(3):
            matcher.step()
        return learned(matcher)

    first, second = two_workers(work)
    alone = matcher_of(AST, expert)
    start = alone.synthetic.images
    for _ in range(3):
        alone.step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert relative_error(first[0] - start, alone.synthetic.images - start) < 1e-4
    assert first[2].item() == pytest.approx(alone.synthetic.learning_rate.item(), rel=1e-5)


def test_a_segment_without_a_finite_loss_stops_or_is_skipped(expert):
    same_everywhere = [expert[0]] * 5
    matcher = matcher_of(MTT, same_everywhere)
    before = matcher.synthetic.images.clone()
    with pytest.raises(DivergedError, match=r"iteration 1: .* from epoch .*`method.max_loss`"):
        matcher.step()
    assert torch.equal(matcher.synthetic.images, before)
    skipping = matcher_of(MTT.model_copy(update={"max_loss": 1.0}), same_everywhere)
    assert skipping.step().skipped
    assert torch.equal(skipping.synthetic.images, before)


def test_a_learned_rate_halves_or_doubles_at_most(expert):
    matcher = matcher_of(MTT.model_copy(update={"step_size_rate": 1e6}), expert)
    rates = [matcher.synthetic.learning_rate.item()]
    for _ in range(3):
        matcher.step()
        rates.append(matcher.synthetic.learning_rate.item())
    assert {now / before for before, now in pairwise(rates)} <= {0.5, 2.0}


def test_ftd_averages_the_images(expert):
    matcher = matcher_of(FTD, expert)
    start = matcher.synthetic.images
    matcher.step()
    mean = 0.9 * start + 0.1 * matcher.synthetic.images
    torch.testing.assert_close(matcher.averaged.images, mean)


def test_datms_window_grows_linearly():
    shape = {"min_start_epoch": 1, "max_start_epoch": 11, "growth_iterations": 4}
    method = Datm(name="datm", images_per_class=1, first_max_start_epoch=3, **shape)
    assert [method.window_end(50, iteration) for iteration in range(6)] == [3, 5, 7, 9, 11, 11]
    assert method.window_end(50) == 11


def test_starts_are_drawn_from_the_window(expert):
    drawn = []

    class Noting(Mtt):
        def start(self, theta, network, generator):
            drawn.append(next(i for i, one in enumerate(expert) if torch.equal(one, theta)))
            return theta

    matcher = matcher_of(Noting(name="x", **SHARED, min_start_epoch=1, max_loss=1e9), expert, ())
    assert {matcher.step().skipped for _ in range(3)} == {False} and set(drawn) == {1}
    matcher = matcher_of(Noting(name="x", **SHARED, max_loss=1e9), expert, ())
    for _ in range(20):
        matcher.step()
    assert set(drawn) == {0, 1}
