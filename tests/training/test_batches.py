import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.training.batches import TokenBatches


def source(num_rows: int, batch_size: int, seed: int = 0) -> TokenBatches:
    ids = np.arange(num_rows, dtype=np.uint16)[:, None] * np.ones(3, np.uint16)
    return TokenBatches(ids, batch_size=batch_size, seed=seed)


def rows(batches: TokenBatches, num_batches: int) -> list[int]:
    return [int(row) for _ in range(num_batches) for row in batches.next_batch().samples[:, 1]]


def test_the_order_is_pinned() -> None:
    assert rows(source(6, 3), 4) == [3, 2, 5, 4, 0, 1, 1, 4, 3, 0, 2, 5]


def test_ids_are_int64_and_belong_to_their_samples() -> None:
    batch = source(6, 4).next_batch()
    assert str(batch.input_ids.dtype) == "torch.int64" and batch.input_ids.shape == (4, 3)
    assert batch.input_ids[:, 0].tolist() == batch.samples[:, 1].tolist()
    assert batch.samples[:, 0].tolist() == [0, 0, 0, 0]


def test_given_samples_travel_along() -> None:
    ids = np.array([[10], [20]], np.uint32)
    samples = np.array([[4, 7], [5, 9]])
    batch = TokenBatches(ids, batch_size=2, seed=0, samples=samples).next_batch()
    pairs = {int(i): s for i, s in zip(batch.input_ids[:, 0], batch.samples.tolist(), strict=True)}
    assert pairs == {10: [4, 7], 20: [5, 9]}


def test_seeds_and_epochs_differ() -> None:
    first, other = rows(source(50, 50), 2), rows(source(50, 50, seed=1), 1)
    assert first[:50] != first[50:] and first[:50] != other


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 6))
def test_every_epoch_has_every_row_once_and_resumes(n: int, batch_size: int, cut: int) -> None:
    whole = rows(source(n, batch_size), 8)
    for epoch in range(len(whole) // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))
    before, after = source(n, batch_size), source(n, batch_size)
    head = rows(before, cut)
    after.load_state_dict(before.state_dict())
    assert head + rows(after, 8 - cut) == whole


def test_no_sequences() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        source(0, 1)
