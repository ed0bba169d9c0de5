import numpy as np
import pyarrow as pa
import pytest
import torch
from training_parts import small_model

from stillhouse.models.scoring import ScoringModel
from stillhouse.selection.quotas import OTHER
from stillhouse.text.pieces import Pieces
from stillhouse.training.evaluate import SourceLoss, SourceLossTally, largest_sources, measure
from stillhouse.training.group import WorkerGroup
from stillhouse.training.stream import TokenSources

MODEL = ScoringModel(small_model(length=6), dtype=torch.float32)
IDS = np.random.default_rng(0).integers(0, 64, (3, 6)).astype(np.uint16)


def test_heldout_nll_is_the_mean_over_tokens() -> None:
    expected = MODEL.token_nll(IDS).astype(np.float64).mean()
    assert measure(MODEL, IDS) == (pytest.approx(expected, abs=1e-12), {})
    mask = np.array([[1, 0, 1, 0, 1, 1]] * 2 + [[0] * 6], np.float32)
    expected = MODEL.token_nll(IDS)[:2][:, [1, 3, 4]].astype(np.float64).mean()
    assert measure(MODEL, IDS, None, mask)[0] == pytest.approx(expected, rel=1e-6)


def test_sources_own_their_positions() -> None:
    pieces = Pieces(
        sequence=np.array([0, 0, 1, 2, 2]),
        start=np.array([0, 4, 0, 0, 1], np.int32),
        end=np.array([4, 6, 6, 1, 6], np.int32),
        file=np.zeros(5, np.int32),
        row=np.arange(5),
        source=np.array([0, 1, 1, 2, 0], np.int32),
        sources=["wiki", "books", "code"],
        ids=pa.array(["a", "b", "c", "d", "e"]),
        offsets=np.array([0, 2, 3, 5]),
    )
    losses = MODEL.token_nll(IDS)
    _, found = measure(MODEL, IDS, pieces)
    assert list(found) == ["books", "wiki"]  # code owns one position, which is not predicted
    assert (found["wiki"].num_tokens, found["books"].num_tokens) == (8, 7)
    wiki = np.concatenate([losses[0, :3], losses[2]])
    books = np.concatenate([losses[0, 3:], losses[1]])
    assert found["wiki"].nll == pytest.approx(wiki.mean(), abs=1e-6)
    assert found["books"].nll == pytest.approx(books.mean(), abs=1e-6)


def test_the_smallest_of_many_sources_are_one() -> None:
    """1,200 sources of 1 to 1,200 tokens; those of 1 to 200 are joined."""
    sums = {f"s{n:04}": (2.0 * n, n) for n in range(1, 1201)}
    found = largest_sources(sums | {OTHER: (30.0, 3)})  # joined with a source of that very name
    assert len(found) == 1001
    assert list(found) == [*(f"s{n:04}" for n in range(201, 1201)), OTHER]
    assert found["s0201"] == SourceLoss(2.0, 201)
    tokens = sum(range(1, 201)) + 3
    assert found[OTHER] == SourceLoss((2.0 * (tokens - 3) + 30.0) / tokens, tokens)


def test_training_losses_belong_to_the_owner_of_a_position() -> None:
    tally, names = SourceLossTally(), ("web", "books", "code")
    sources = TokenSources(np.array([[0, 0, 1], [2, 1, 1]], np.int32), names)
    tally.add(np.array([[1, 2], [3, 4]], np.float32), sources)
    tally.add(np.array([[5, 6], [7, 8]], np.float32), sources)
    sea = TokenSources(np.array([[1, 1, 1]], np.int32), ("web", "sea"))  # other codes and names
    tally.add(np.array([[9, 9]], np.float32), sea)
    # the first position of a sequence is not predicted, so `code` has no token
    assert tally.take(WorkerGroup()) == {
        "books": SourceLoss((2 + 3 + 4 + 6 + 7 + 8) / 6, 6),
        "sea": SourceLoss(9, 2),
        "web": SourceLoss(3, 2),
    }
    assert tally.take(WorkerGroup()) == {}
