"""INFER's sets: real images and compensators apart, and the images that they stand for."""

import pyarrow as pa
import pytest
import torch
from small_networks import PLAIN, noise

from stillhouse.distillation.stored_sets import (
    CompensatedSet,
    expanded_set,
    flat_values,
    pixel_set,
    read_set,
    set_table,
)
from stillhouse.storage.parquet import parquet_bytes, read_table


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


def test_rows_are_real_images_then_compensators():
    table = set_table(small_set("static"))
    kinds = [[row is not None for row in table[name].to_pylist()] for name in table.column_names]
    real, compensators = [True] * 6 + [False] * 4, [False] * 6 + [True] * 4
    assert dict(zip(table.column_names, kinds, strict=True)) == {
        "label": real,
        "values": real,
        "compensator": compensators,
        "label_logits": real,
    }
    assert table["label_logits"].type == pa.list_(pa.list_(pa.float16(), 3), 3)


def test_a_compensator_that_changes_nothing_is_drawn_in_grey():
    both = CompensatedSet(
        torch.zeros(1, 2, 1, 1, 3, dtype=torch.uint8),
        torch.tensor([-127, 0, 127], dtype=torch.int8).view(1, 1, 1, 1, 3),
    )
    assert both.pictures().flatten().tolist() == [0.0, 0.5, 1.0]
