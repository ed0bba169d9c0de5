import pytest
import torch

from stillhouse.distillation.matching import label_logits
from stillhouse.distillation.real_images import choose_right
from stillhouse.distillation.trajectory import label_loss
from stillhouse.errors import InputError


def test_labels_are_the_mean_over_the_experts_that_are_right():
    experts = torch.tensor(
        [[[3.0, 1.0], [0.0, 2.0]], [[1.0, 5.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]
    )
    found = label_logits(experts[:2], torch.tensor([0, 1]))
    assert found.tolist() == [[3, 1], [0, 2]]
    found = label_logits(experts, torch.tensor([0, 1]))
    assert found.tolist() == [[2, 0.5], [0, 2]]


def test_where_no_expert_is_right_all_count():
    experts = torch.tensor([[[3.0, 1.0]], [[1.0, 0.0]]])
    assert label_logits(experts, torch.tensor([1])).tolist() == [[2, 0.5]]


def test_right_images_come_first():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    logits = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    rows = choose_right(logits, labels, 2, torch.Generator().manual_seed(0)).tolist()
    assert set(rows[:2]) == {0, 2}
    assert rows[2] == 3 and rows[3] in {4, 5}


def test_a_class_with_too_few_images_is_refused():
    with pytest.raises(InputError, match=r"class 1 has 1 training images, 2 are needed"):
        choose_right(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 1]), 2, torch.Generator())


def test_soft_cross_entropy_by_hand():
    """softmax [0.5, 0.5] against softmax [0.75, 0.25]: -0.5 (ln 0.75 + ln 0.25)."""
    logits = torch.tensor([[0.75, 0.25]]).log()
    loss = label_loss(logits, torch.zeros(1, 2))
    assert loss.item() == pytest.approx(0.8369882)
    assert label_loss(logits, torch.tensor([0])).item() == pytest.approx(0.2876821)
