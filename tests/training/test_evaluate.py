import numpy as np
import pyarrow as pa
import pytest
import torch
from training_parts import small_model

from stillhouse.models.scoring import ScoringModel
from stillhouse.selection.quotas import OTHER
from stillhouse.text.pieces import Pieces
from stillhouse.training.evaluate import (
    SourceLoss,
    SourceLossTally,
    largest_sources,
    measure,
    split_halves,
)
from stillhouse.training.group import WorkerGroup
from stillhouse.training.stream import TokenSources

MODEL = ScoringModel(small_model(length=6), dtype=torch.float32)
IDS = np.random.default_rng(0).integers(0, 64, (3, 6)).astype(np.uint16)


def test_heldout_nll_is_the_mean_over_tokens() -> None:
    expected = MODEL.token_nll(IDS).astype(np.float64).mean()
    assert measure(MODEL, IDS) == (pytest.approx(expected, abs=1e-12), {}, {})
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
    found = measure(MODEL, IDS, pieces).sources
    assert list(found) == ["books", "wiki"]  # code owns one position, which is not predicted
    assert (found["wiki"].num_tokens, found["books"].num_tokens) == (8, 7)
    wiki = np.concatenate([losses[0, :3], losses[2]])
    books = np.concatenate([losses[0, 3:], losses[1]])
    assert found["wiki"].nll == pytest.approx(wiki.mean(), abs=1e-6)
    assert found["books"].nll == pytest.approx(books.mean(), abs=1e-6)


def documents(lengths, tokens, length):
    """Documents packed one after another into sequences of `length`, with their pieces."""
    rows, row, at = [], 0, 0
    for document, size in enumerate(lengths):
        left = size
        while left:
            took = min(left, length - at)
            rows.append((row, at, at + took, document))
            left, at = left - took, at + took
            row, at = (row + 1, 0) if at == length else (row, at)
    sequence, start, end, document = (np.array(column) for column in zip(*rows, strict=True))
    pieces = Pieces(
        sequence=sequence,
        start=start.astype(np.int32),
        end=end.astype(np.int32),
        file=np.zeros(len(rows), np.int32),
        row=document,
        source=np.zeros(len(rows), np.int32),
        sources=["web"],
        ids=pa.array([str(one) for one in document]),
        offsets=np.searchsorted(sequence, np.arange(row + 1)),
    )
    return np.concatenate(tokens).reshape(-1, length), pieces


def test_halves_are_the_means_of_their_documents() -> None:
    """Eight documents of 3 to 10 tokens in eight sequences; the last one is the first one again."""
    rng, lengths = np.random.default_rng(1), [3, 10, 4, 9, 5, 8, 6, 3]
    tokens = [rng.integers(0, 64, size).astype(np.uint16) for size in lengths]
    tokens[-1] = tokens[0]
    ids, pieces = documents(lengths, tokens, 6)
    halves = split_halves(ids, pieces)
    of = {int(pieces.row[i]): int(half) for i, half in enumerate(halves)}
    assert [of[int(row)] for row in pieces.row] == halves.tolist()  # a document is in one half
    assert of[0] == of[7]
    shares = [sum(size for i, size in enumerate(lengths) if of[i] == half) for half in (0, 1)]
    assert abs(shares[0] - shares[1]) <= max(lengths)
    losses, mask = MODEL.token_nll(ids), rng.integers(0, 2, ids.shape).astype(np.float32)
    sums, counts = [0.0, 0.0], [0, 0]
    for row, start, end, half in zip(
        pieces.sequence, pieces.start, pieces.end, halves, strict=True
    ):
        for position in range(max(1, start), end):
            if mask[row, position]:
                sums[half] += float(losses[row, position - 1])
                counts[half] += 1
    found = measure(MODEL, ids, pieces, mask, halves).halves
    assert list(found) == ["validation", "test"]
    for half, made in enumerate(found.values()):
        assert made.num_tokens == counts[half]
        assert made.nll == pytest.approx(sums[half] / counts[half], rel=1e-6)


def test_halves_depend_on_content_alone() -> None:
    ids = np.random.default_rng(2).integers(0, 64, (40, 6)).astype(np.uint16)
    halves, order = split_halves(ids), np.random.default_rng(3).permutation(40)
    assert halves.sum() == 20
    assert split_halves(ids[order].astype(np.int64)).tolist() == halves[order].tolist()
    losses = MODEL.token_nll(ids)
    found = measure(MODEL, ids, halves=halves).halves
    assert found["validation"].nll == pytest.approx(losses[halves == 0].mean(), rel=1e-6)
    assert found["test"] == SourceLoss(pytest.approx(losses[halves == 1].mean(), rel=1e-6), 100)
    alone = measure(MODEL, ids[:1], halves=split_halves(ids[:1]))
    assert alone.halves == {}


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
