"""Which real images are taken: baselines, and starts of AST and DATM."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.distillation.matching import label_loss
from stillhouse.distillation.matching_task import label_logits
from stillhouse.distillation.real_images import (
    choose_right,
    herding,
    k_centre,
    k_means,
    random_real,
    representative_rows,
    without_last,
)
from stillhouse.errors import InputError

LABELS = np.array([0, 1, 0, 1, 0, 1, 0])
LINE = np.array([[0.0], [10.0], [1.0], [20.0], [2.0], [30.0], [7.0]])


def test_herding_keeps_the_mean_by_hand():
    # class 0 at 0, 1, 2, 7 (mean 2.5): 2, then {2, 1} or {2, 0} or {2, 7}: 4.5/2..., 7 is off by 2
    assert herding(LINE, LABELS, 2).tolist() == [4, 2, 3, 1]


def test_k_centre_begins_in_the_middle_and_goes_far_by_hand():
    assert k_centre(LINE, LABELS, 3).tolist() == [4, 6, 0, 3, 1, 5]


def test_copies_of_an_image_are_chosen_once_each():
    same = np.zeros((4, 2))
    labels = np.zeros(4, int)
    assert sorted(k_centre(same, labels, 4)) == sorted(herding(same, labels, 4)) == [0, 1, 2, 3]


@given(st.integers(1, 3), st.integers(0, 1000))
def test_all_give_rows_of_each_class_once(count, seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3).repeat(3), rng.integers(0, 3, 6)])
    features = rng.standard_normal((len(labels), 4)).astype(np.float32)
    for rows in (
        random_real(labels, count, seed=seed),
        herding(features, labels, count),
        k_centre(features, labels, count),
    ):
        assert labels[rows].tolist() == np.arange(3).repeat(count).tolist()
        assert len(set(rows.tolist())) == 3 * count


@given(st.integers(0, 1000))
def test_k_centre_is_within_twice_the_best_radius(seed):
    points = np.random.default_rng(seed).integers(0, 50, (8, 2)).astype(float)
    rows = k_centre(points, np.zeros(8, int), 2)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    best = min(distance[[i, j]].min(0).max() for i in range(8) for j in range(i))
    assert distance[rows].min(0).max() <= 2 * best + 1e-9


@pytest.mark.parametrize("choose", [herding, k_centre])
def test_too_few_images_of_a_class(choose):
    with pytest.raises(InputError, match="class 1 has 3 training images, 4 are needed"):
        choose(LINE, LABELS, 4)
    with pytest.raises(InputError, match="class 1 has 3"):
        random_real(LABELS, 4, seed=0)


def test_a_number_that_classes_do_not_share_evenly_is_drawn_by_lot():
    rows = np.arange(12).reshape(4, 3)
    assert without_last(rows, 12, 0).tolist() == list(range(12))
    kept = without_last(rows, 10, 0)
    assert len(kept) == 10
    assert set(range(12)) - set(kept.tolist()) < {2, 5, 8, 11}
    lots = {tuple(without_last(rows, 10, seed)) for seed in range(20)}
    assert len(lots) > 1


def test_labels_are_the_mean_over_the_experts_that_are_right():
    experts = torch.tensor(
        [[[3.0, 1.0], [0.0, 2.0]], [[1.0, 5.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]
    )
    found = label_logits(experts[:2], torch.tensor([0, 1]))
    assert found.tolist() == [[3, 1], [0, 2]]
    found = label_logits(experts, torch.tensor([0, 1]))
    assert found.tolist() == [[2, 0.5], [0, 2]]
    none_right = torch.tensor([[[3.0, 1.0]], [[1.0, 0.0]]])
    assert label_logits(none_right, torch.tensor([1])).tolist() == [[2, 0.5]]


def test_right_images_come_first():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    logits = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    rows = choose_right(logits, labels, 2, torch.Generator().manual_seed(0)).tolist()
    assert set(rows[:2]) == {0, 2}
    assert rows[2] == 3 and rows[3] in {4, 5}


def test_soft_cross_entropy_by_hand():
    """softmax [0.5, 0.5] against softmax [0.75, 0.25]: -0.5 (ln 0.75 + ln 0.25)."""
    logits = torch.tensor([[0.75, 0.25]]).log()
    loss = label_loss(logits, torch.zeros(1, 2))
    assert loss.item() == pytest.approx(0.8369882)
    assert label_loss(logits, torch.tensor([0])).item() == pytest.approx(0.2876821)


def test_k_means_finds_groups_apart():
    features = torch.tensor([[0.0, 0], [0, 2], [100, 0], [100, 2], [0, 100], [0, 102]])
    centres = k_means(features, 3, torch.Generator().manual_seed(0))
    assert sorted(centres.tolist()) == [[0, 1], [0, 101], [100, 1]]


@pytest.mark.parametrize("count", [1, 3, 10, 12, 20])
def test_representative_rows_are_different_and_repeatable(count):
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    found = [
        representative_rows(logits, count, torch.Generator().manual_seed(2)).tolist()
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == count and set(found[0]) <= set(range(20))
    equal = representative_rows(torch.ones(20, 3), count, torch.Generator().manual_seed(0))
    assert len(set(equal.tolist())) == count


def test_the_row_nearest_to_the_mean_represents_a_class_alone():
    logits = torch.tensor([[0.0], [9.0], [5.5], [7.0]])  # mean 5.375
    assert representative_rows(logits, 1, torch.Generator().manual_seed(0)).tolist() == [2]
