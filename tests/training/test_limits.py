"""`max_epochs`: trainings for which the data do not last, and how long they may be."""

import pytest
from trainings import train_task

from stillhouse.errors import SpecError
from stillhouse.training.limits import within_limits
from stillhouse.training.schedule import EVEN, Schedule, Share
from stillhouse.training.task import TokenSet

KEYS = ["data.0", "data.1"]


@pytest.fixture
def task(untrained):
    """Sets of 100 and of 40 sequences of 10 tokens, in batches of 8 on 4 lanes."""

    def make(num_steps, *shares):
        sets = tuple(
            TokenSet(name, ("x",), (rows,), (name * 64,), 10, share=share)
            for name, rows, share in zip("ab", (100, 40), shares, strict=False)
        )
        settings = {"global_batch": 8, "lanes": 4}
        return train_task(sets, untrained["tokenizer"]["path"], num_steps, settings=settings)

    return make


def test_data_that_last_are_left_alone(task):
    for shares in ((EVEN, EVEN), (EVEN, Share(1.0, 3)), (Share(2.0, 3, True), Share(1.0, 1, True))):
        for asked in (True, False):
            found = task(15, *shares)
            assert within_limits(found, KEYS, asked=asked) is found


def test_data_that_do_not_last_are_refused(task):
    with pytest.raises(SpecError) as refused:
        within_limits(task(300, EVEN, Share(1.0, 2)), KEYS, asked=True)
    # 1,200 of 2,400 sequences are 30 times 40; 80 of set 1 are had within 20 steps
    said = str(refused.value)
    assert said.startswith("`data.1.max_epochs: 2`: 24000 tokens of training see 'b' ")
    assert float(said.split("see 'b' ")[1].split(" ")[0]) == pytest.approx(30, rel=0.05)
    assert "which has 400 tokens" in said and "`data.1.when_exhausted: reweight`" in said
    fits = int(said.split("`train.num_tokens` has to be ")[1].split(" ")[0])
    assert 80 * 15 <= fits <= 80 * 21 and fits % 80 == 0
    found = task(fits // 80, EVEN, Share(1.0, 2))
    assert within_limits(found, KEYS, asked=True) is found
    with pytest.raises(SpecError, match=r"`data.1.max_epochs: 2`"):
        within_limits(task(fits // 80 + 1, EVEN, Share(1.0, 2)), KEYS, asked=True)


def test_one_data_set_bounds_the_training(task):
    with pytest.raises(SpecError, match=r"see 'a' 2\.08 times.*has to be 2000 or less, or raise"):
        within_limits(task(26, Share(1.0, 2)), ["data"], asked=True)
    found = task(25, Share(1.0, 2))
    assert within_limits(found, ["data"], asked=True) is found


def test_a_length_that_nobody_asked_for_is_rounded_down(task):
    """Half an epoch of 100 rows: 12 whole rows of each of 4 lanes, 6 steps of 8 sequences."""
    assert within_limits(task(7, Share(1.0, 0.5)), ["data"], asked=False).num_steps == 6
    with pytest.raises(SpecError, match="has to be 480 or less"):
        within_limits(task(7, Share(1.0, 0.5)), ["data"], asked=True)
    with pytest.raises(SpecError, match=r"`data.1.max_epochs: 1`"):
        within_limits(task(100, EVEN, Share(1.0, 1)), KEYS, asked=False)


def test_nothing_left_is_refused(task):
    both = Share(1.0, 1, True), Share(1.0, 1, True)
    with pytest.raises(SpecError, match=r"of 1440 tokens all data sets .* exhausted after 1360: "):
        within_limits(task(18, *both), KEYS, asked=True)
    assert within_limits(task(18, *both), KEYS, asked=False).num_steps == 17
    late = Schedule(((0.0, 0.0), (0.5, 1.0)))
    early = Schedule(((0.0, 1.0), (0.5, 0.0)))
    with pytest.raises(SpecError, match="all data sets that have a weight are exhausted after 400"):
        within_limits(task(40, Share(late), Share(early, 1, True)), KEYS, asked=True)
    with pytest.raises(SpecError, match="there is no such training"):
        within_limits(task(5, Share(1.0, 0.001)), ["data"], asked=True)
