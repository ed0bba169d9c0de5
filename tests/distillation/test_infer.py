"""INFER: its budget, its compensators, and the sets that store them apart from real images."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import PLAIN, VECTORS, noise, teacher

from stillhouse.distillation.methods.infer import (
    Infer,
    compensate,
    compensated_set,
    compensator_budget,
)
from stillhouse.distillation.methods.sre2l import matching_loss
from stillhouse.distillation.stored_sets import (
    CompensatedSet,
    expanded_set,
    flat_values,
    pixel_set,
    read_set,
    set_table,
)
from stillhouse.errors import BudgetError
from stillhouse.storage.parquet import parquet_bytes, read_table

BUDGETS = json.loads((VECTORS / "dd_infer_04_budget.json").read_text())


@pytest.mark.parametrize("case", BUDGETS)
def test_budget_reproduces_the_reference(case):
    expected = BUDGETS[case]
    arguments = expected["ipc"], expected["M"], expected["num_class"]
    if expected["ipc_init"] == 0:
        with pytest.raises(BudgetError, match="at least 2 are needed"):
            compensator_budget(*arguments)
        return
    assert compensator_budget(*arguments) == expected["ipc_init"]


@given(st.integers(1, 300), st.integers(1, 12), st.integers(2, 300))
def test_the_budget_is_kept_and_the_smallest_named_is_the_smallest(ipc, teachers, classes):
    try:
        num_real = compensator_budget(ipc, teachers, classes)
    except BudgetError as error:
        smallest = int(str(error).split("at least ")[1].split()[0])
        assert smallest > ipc
        assert compensator_budget(smallest, teachers, classes) >= 1
        with pytest.raises(BudgetError):
            compensator_budget(smallest - 1, teachers, classes)
    else:
        assert num_real * (classes + teachers) <= ipc * classes
        assert (num_real + 1) * (classes + teachers) > ipc * classes


def test_a_compensator_is_shared_and_lowers_the_loss():
    images, labels = 0.1 * noise(3, 1, 8, 8), torch.arange(3)
    settings = Infer(name="infer", images_per_class=1, iterations=30, learning_rate=0.1, jitter=0)

    def run():
        return compensate(teacher(), images, labels, settings, rng=np.random.default_rng(0))

    compensator, losses = run()
    assert compensator.shape == (1, 1, 8, 8)
    assert losses[0] == pytest.approx(matching_loss(teacher(), images, labels, 1.0).item())
    after = matching_loss(teacher(), images + compensator, labels, 1.0).item()
    assert after < min(losses[0], 0.7 * losses[0])
    assert torch.equal(compensator, run()[0])


def make_set(num_real=2, num_teachers=3, num_classes=3):
    real = [PLAIN.clip(noise(num_classes, 1, 8, 8, seed=k)) for k in range(num_real)]
    every = [
        [0.5 * noise(1, 1, 8, 8, seed=10 * m + k) for k in range(num_real)]
        for m in range(num_teachers)
    ]
    return real, every, compensated_set(real, every, PLAIN)


def test_expanded_images_are_the_real_ones_then_each_teachers():
    real, compensators, stored = make_set()
    images, labels = PLAIN.apply(stored.expand() / 255), stored.labels
    assert images.shape == (4 * 2 * 3, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2] * 8
    half_a_level = 0.5 / 255 / 0.25 + 1e-6
    torch.testing.assert_close(images[:6], torch.cat(real), rtol=0, atol=half_a_level)
    m, k, c = 1, 1, 2
    found = images[(m + 1) * 6 + k * 3 + c]
    expected = PLAIN.clip(real[k][c] + compensators[m][k][0])
    tolerance = 2 * half_a_level + 0.5 / 127 / 0.25
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_compensator_beyond_the_range_of_pixels_loses_nothing():
    real = [PLAIN.clip(noise(2, 1, 4, 4))]
    huge = [[torch.full((1, 1, 4, 4), 1000.0)]]
    pixels = compensated_set(real, huge, PLAIN).expand()
    assert (pixels[2:] == 255).all()


def all_sums():
    """Every level with every compensator: one class, K = 1, M = 255 compensators."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16)
    shifts = torch.arange(-127, 128).to(torch.int8).view(255, 1, 1, 1, 1)
    return CompensatedSet(levels, shifts.expand(255, 1, 1, 16, 16).contiguous())


def test_every_sum_is_rounded_to_the_nearest_level_and_clipped():
    found = all_sums().expand().view(256, 256)
    assert found[0].tolist() == list(range(256))
    for shift in range(-127, 128):
        # the nearest whole number to 255 u / 127, which is never midway
        by = (2 * 255 * shift + 127) // (2 * 127)
        expected = [min(max(level + by, 0), 255) for level in range(256)]
        assert found[128 + shift].tolist() == expected


def test_sums_are_those_of_pixels_rounded_when_they_were_standardised():
    both = all_sums()
    pixels = both.real.float() / 255
    sums = (pixels + both.compensators.float()[:, :, None] / 127).clamp(0, 1)
    images = PLAIN.apply(torch.cat([pixels[None], sums]).flatten(0, 2))
    expected = pixel_set(images, both.labels, 1, PLAIN.ranges)
    made = expanded_set(both, PLAIN.ranges)
    assert torch.equal(made.images, expected.images)
    assert made.ranges == expected.ranges


def small_set(labels):
    """K = 2, 3 classes, M = 2, images of 2x2: 18 of them."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (2, 3, 1, 2, 2), generator=generator).to(torch.uint8)
    shifts = torch.randint(-127, 128, (2, 2, 1, 2, 2), generator=generator).to(torch.int8)
    made = expanded_set(CompensatedSet(real, shifts), PLAIN.ranges)
    return made.with_logits(5 * noise(18, 3)) if labels == "static" else made


@pytest.mark.parametrize("labels", ["classes", "static"])
def test_a_table_holds_the_bytes_that_are_claimed_and_gives_the_set_back(labels, tmp_path):
    made = small_set(labels)
    (tmp_path / "set.parquet").write_bytes(parquet_bytes(set_table(made)))
    table = read_table(str(tmp_path / "set.parquet"))
    assert table.num_rows == 2 * 3 + 2 * 2
    images = [flat_values(table, name) for name in ("values", "compensator")]
    assert [values.dtype for values in images] == ["uint8", "int8"]
    assert sum(values.nbytes for values in images) == made.stored.images == (6 + 4) * 4
    classes = table["label"].drop_null()
    if labels == "static":
        assert flat_values(table, "label_logits").nbytes == made.stored.labels == 18 * 3 * 2
    else:
        assert len(classes) == made.stored.labels  # a byte each
    assert classes.to_pylist() == [0, 1, 2, 0, 1, 2]
    found = read_set(table, "here")
    assert torch.equal(found.images, made.images)
    assert torch.equal(found.labels, made.labels)
    assert found.labels.tolist() == [0, 1, 2] * 6
    assert found.stored == made.stored
    if labels == "static":
        assert torch.equal(found.label_logits, made.label_logits)
        row = table["label_logits"][4].as_py()  # k = 1, class 1: plain, then by each teacher
        assert row == [made.label_logits[4 + 6 * m].tolist() for m in range(3)]
