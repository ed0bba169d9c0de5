"""Mean NLL of a predicted token in nats, held out and in training, in total and by source.

In a packed sequence, a token's source is that of the document that owns its position. Held-out
documents are split in two halves, so that what was chosen on one can be reported on the other.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.selection.color import TokenLosses, piece_sums
from stillhouse.selection.quotas import MAX_SOURCES, OTHER
from stillhouse.text.pieces import Pieces
from stillhouse.training.group import WorkerGroup
from stillhouse.training.stream import TokenSources
from stillhouse.training.task import HALVES

_BLOCK = 4096  # sequences whose token losses are held at once
_MOST_SOURCES = 50_000  # tracked during training; beyond, the smaller half becomes `OTHER`


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """Mean NLL in nats over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int


def largest_sources(sums: Mapping[str, tuple[float, int]]) -> dict[str, SourceLoss]:
    """Losses from sums of NLL and tokens by source: the `MAX_SOURCES` largest, the rest as `OTHER`.

    Sorted by name; of equally large ones those that come first by name are kept.
    """
    order = sorted(sums.keys() - {OTHER}, key=lambda name: (-sums[name][1], name))
    kept = {name: sums[name] for name in sorted(order[:MAX_SOURCES])}
    rest = [sums[name] for name in (*order[MAX_SOURCES:], OTHER) if name in sums]
    if rest:
        kept[OTHER] = sum(n for n, _ in rest), sum(t for _, t in rest)
    return {name: SourceLoss(nll / tokens, tokens) for name, (nll, tokens) in kept.items()}


def split_halves(input_ids: NDArray[Any], pieces: Pieces | None = None) -> NDArray[np.int64]:
    """The half, 0 or 1, of each of p pieces of documents; without `pieces`, of each sequence.

    It depends on the tokens alone: in the order of their hashes, each document goes to the half
    that has fewer tokens so far. Equal documents are in one half, as all pieces of one are.

    Args:
        input_ids: integers [N, T].
        pieces: the documents in them.
    """
    num_rows, length = input_ids.shape
    flat = np.ascontiguousarray(input_ids, "<i4").ravel()
    if pieces is None:
        owners, start = np.arange(num_rows), np.arange(num_rows) * length
        end = start + length
    else:
        owners = pieces.owners()
        start, end = (pieces.sequence * length + at for at in (pieces.start, pieces.end))
    hashes = [hashlib.sha256() for _ in range(int(owners.max(initial=-1)) + 1)]
    for owner, first, last in zip(owners.tolist(), start.tolist(), end.tolist(), strict=True):
        hashes[owner].update(flat[first:last])
    digests = [made.digest() for made in hashes]
    tokens: dict[bytes, int] = dict.fromkeys(sorted(digests), 0)
    for digest, count in zip(digests, np.bincount(owners, end - start).tolist(), strict=True):
        tokens[digest] += int(count)
    half, sums = dict[bytes, int](), [0, 0]
    for digest, count in tokens.items():
        half[digest] = int(sums[1] < sums[0])
        sums[half[digest]] += count
    return np.array([half[digest] for digest in digests], np.int64)[owners]


class Measured(NamedTuple):
    """Losses of held-out sequences.

    Attributes:
        nll: the mean over all predicted tokens.
        sources: by source; empty without documents.
        halves: by half (`HALVES`); empty without halves, or where one has no predicted token.
    """

    nll: float
    sources: dict[str, SourceLoss]
    halves: dict[str, SourceLoss]


def measure(
    model: TokenLosses,
    input_ids: NDArray[Any],
    pieces: Pieces | None = None,
    mask: NDArray[np.float32] | None = None,
    halves: NDArray[np.int64] | None = None,
) -> Measured:
    """Mean losses over predicted tokens, in total, by source and by half, in one pass.

    Args:
        input_ids: integers [N, T], N >= 1.
        pieces: the documents in them.
        mask: [N, T], 1 for tokens that count; default all.
        halves: of `split_halves`.
    """
    blocks = range(0, len(input_ids), _BLOCK)
    losses = np.concatenate([model.token_nll(input_ids[i : i + _BLOCK]) for i in blocks])
    counted = np.ones_like(losses) if mask is None else mask[:, 1:]
    if mask is not None:
        losses = losses * counted
    nll, tokens = (_sums(values, pieces) for values in (losses, counted))
    by_source: dict[str, SourceLoss] = {}
    if pieces is not None:
        found = _by_group(pieces.source, pieces.sources, nll, tokens)
        by_source = largest_sources({name: sums for name, sums in found.items() if sums[1] > 0})
    by_half: dict[str, SourceLoss] = {}
    if halves is not None:
        found = _by_group(halves, HALVES, nll, tokens)
        if all(count > 0 for _, count in found.values()):
            by_half = {name: SourceLoss(n / count, count) for name, (n, count) in found.items()}
    total = float(losses.sum(dtype=np.float64))
    mean = total / max(1.0, float(counted.sum(dtype=np.float64)))
    return Measured(mean, by_source, by_half)


def heldout_bytes(
    input_ids: NDArray[Any],
    token_bytes: NDArray[np.int64],
    pieces: Pieces | None = None,
    mask: NDArray[np.float32] | None = None,
) -> dict[str | None, int]:
    """Bytes of the text of the predicted tokens that `measure` averages, by source; None: of all.

    Args:
        token_bytes: by id [V].
    """
    values = token_bytes[input_ids[:, 1:]].astype(np.float32)
    if mask is not None:
        values = values * mask[:, 1:]
    found: dict[str | None, int] = {None: int(values.sum(dtype=np.float64))}
    if pieces is not None:
        sums = np.bincount(pieces.source, _sums(values, pieces), len(pieces.sources))
        found |= {name: int(n) for name, n in zip(pieces.sources, sums.tolist(), strict=True)}
    return found


def bits_per_byte(loss: SourceLoss, num_bytes: int) -> float | None:
    """The loss over a text's length, which does not depend on the tokenizer; None without text."""
    return loss.nll * loss.num_tokens / (math.log(2) * num_bytes) if num_bytes else None


def _sums(values: NDArray[np.float32], pieces: Pieces | None) -> NDArray[np.float64]:
    """Sums of values [N, T-1] by piece [p]; without pieces, by sequence [N]."""
    if pieces is None:
        return values.sum(axis=1, dtype=np.float64)
    sums, _ = piece_sums(values, pieces.sequence, pieces.start, pieces.end)
    return sums.astype(np.float64)


def _by_group(
    groups: NDArray[Any],
    names: Sequence[str],
    nll: NDArray[np.float64],
    tokens: NDArray[np.float64],
) -> dict[str, tuple[float, int]]:
    """Sums of NLL and tokens by name of the group that each row is of."""
    sums = (np.bincount(groups, values, len(names)).tolist() for values in (nll, tokens))
    return {name: (n, int(count)) for name, n, count in zip(names, *sums, strict=True)}


class SourceLossTally:
    """Training losses by source since the last `take`; not part of a training's state."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(
        self,
        token_nll: NDArray[np.float32],
        sources: TokenSources,
        mask: NDArray[np.float32] | None = None,
    ) -> None:
        """Add the losses [B, T-1] of a batch's predicted tokens; column t-1 is position t.

        `mask` [B, T] marks those that count; default all.
        """
        counted = slice(None) if mask is None else mask[:, 1:].ravel() > 0
        codes = sources.codes[:, 1:].ravel()[counted]
        losses = token_nll.ravel()[counted].astype(np.float64)
        nll = np.bincount(codes, losses, len(sources.names))
        tokens = np.bincount(codes, minlength=len(sources.names))
        used = np.flatnonzero(tokens).tolist()
        _add(self._sums, ((sources.names[i], (float(nll[i]), int(tokens[i]))) for i in used))
        if len(self._sums) > 2 * _MOST_SOURCES:
            order = sorted(self._sums, key=lambda name: (-self._sums[name][1], name))
            small = [(OTHER, self._sums.pop(name)) for name in order[_MOST_SOURCES:]]
            _add(self._sums, small)

    def take(self, group: WorkerGroup) -> dict[str, SourceLoss]:
        """The losses of all workers' tokens (`largest_sources`), and reset; all workers call it."""
        gathered = group.gather(self._sums)
        self._sums = {}
        total: dict[str, tuple[float, int]] = {}
        for sums in gathered:
            _add(total, sums.items())
        return largest_sources(total)


def _add(sums: dict[str, tuple[float, int]], more: Iterable[tuple[str, tuple[float, int]]]) -> None:
    for name, (nll, tokens) in more:
        before = sums.get(name, (0.0, 0))
        sums[name] = before[0] + nll, before[1] + tokens
