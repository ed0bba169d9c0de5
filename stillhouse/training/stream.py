"""A worker's share of every global batch, streamed from parts in the order of `SampleOrder`.

Windows are fetched ahead of the training, in the order of need (`fetch`). A thread assembles the
next batch while the model trains on the current one. Memory: a window for each of the worker's
lanes and data sets, and what is fetched ahead.

    order = SampleOrder([Rows([part.num_rows for part in parts])], ...)
    stream = TokenStream(order, read_ahead(PartReader(uris), rows), rank=0, num_workers=4)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import ArtifactError
from stillhouse.text.pieces import LOSS_MASK, Pieces, read_pieces, token_ids
from stillhouse.training.fetch import Fetch
from stillhouse.training.order import SampleOrder, Window


@dataclass(frozen=True, slots=True)
class TokenSources:
    """The source of every token: `codes` int32 [B, T] are indices into `names`."""

    codes: NDArray[np.int32]
    names: tuple[str, ...]

    def present(self) -> list[str]:
        """The sources of at least one token, sorted."""
        return sorted(self.names[i] for i in np.unique(self.codes))


@dataclass(frozen=True, slots=True)
class Batch:
    """A global batch, or a worker's share of it.

    Attributes:
        inputs: token ids int64 [B, T] or images float32 [B, C, H, W], on the CPU.
        samples: int64 [B, 2], part and row of each sequence.
        sources: of every token, if they are known.
        signals: further columns that an objective reads, by name: [B] or [B, m], such as [B, T].
    """

    inputs: Tensor
    samples: NDArray[np.int64]
    sources: TokenSources | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class BatchSource(Protocol):
    """An endless sequence of global batches (a worker's rows of them), resumable at any step."""

    def next_batch(self) -> Batch:
        """The next batch; always of the same shape."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


@dataclass(slots=True)
class _Loaded:
    """A window in memory: rows in file order, their shuffled order, and names of sources."""

    window: Window
    order: NDArray[np.int64]
    input_ids: NDArray[Any]
    samples: NDArray[np.int64]
    signals: dict[str, NDArray[Any]]
    pieces: Pieces | None
    names: list[str]

    def token_codes(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The source of each token of some rows, as indices into `names`: int32 [n, T]."""
        length = self.input_ids.shape[1]
        if self.pieces is None:
            return np.zeros((len(rows), length), np.int32)
        counts = np.diff(self.pieces.offsets)[rows]
        skipped = np.repeat(self.pieces.offsets[rows] - np.cumsum(counts) + counts, counts)
        piece = skipped + np.arange(counts.sum())
        tokens = self.pieces.end[piece] - self.pieces.start[piece]
        return np.repeat(self.pieces.source[piece], tokens).reshape(-1, length)


_Taken = tuple[_Loaded, NDArray[np.int64], NDArray[np.int64]]
"""A window, rows of it, and their places in a batch."""


def _batch(taken: Sequence[_Taken]) -> Batch:
    """The rows in the order of their places, with names of the sources in this batch only."""
    names: dict[str, int] = {}
    codes: list[NDArray[np.int32]] = []
    for loaded, rows, _ in taken:
        used, inverse = np.unique(loaded.token_codes(rows), return_inverse=True)
        table = [names.setdefault(loaded.names[i], len(names)) for i in used.tolist()]
        codes.append(np.array(table, np.int32)[inverse].reshape(len(rows), -1))
    back = np.argsort(np.concatenate([places for _, _, places in taken]))

    def joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(list(arrays))[back]

    return Batch(
        torch.from_numpy(joined(one.input_ids[rows] for one, rows, _ in taken).astype(np.int64)),
        joined(one.samples[rows] for one, rows, _ in taken),
        TokenSources(joined(codes), tuple(names)),
        {
            name: torch.from_numpy(joined(one.signals[name][rows] for one, rows, _ in taken))
            for name in taken[0][0].signals
        },
    )


class OrderedStream(ABC):
    """A worker's rows of every global batch, in the order of `SampleOrder`; a `BatchSource`.

    The workers' batches, concatenated by rank, are the global batch. A thread assembles the next
    one while the model trains on the current one. The state is the number of samples that all
    workers consumed: it is the same on all, for any number of them.

    Args:
        rank, num_workers: determine this worker's lanes.
        num_steps: of the training; nothing beyond is assembled. Default: endless.
    """

    def __init__(
        self, order: SampleOrder, *, rank: int, num_workers: int, num_steps: int | None = None
    ) -> None:
        self._order, self._num_steps = order, num_steps
        self._lanes = order.lanes_of(rank, num_workers)
        self._thread = ThreadPoolExecutor(1, "next-batch")
        self._next: Future[Batch] | None = None
        self._step = 0

    @abstractmethod
    def _assemble(self, step: int) -> Batch:
        """The rows of a step, in the thread."""

    def next_batch(self) -> Batch:
        """This worker's rows of the next global batch.

        Raises:
            ArtifactError: as `_assemble`.
        """
        ready = self._next or self._thread.submit(self._assemble, self._step)
        batch = ready.result()
        self._step += 1
        self._next = None
        if self._num_steps is None or self._step < self._num_steps:
            self._next = self._thread.submit(self._assemble, self._step)
        return batch

    def state_dict(self) -> dict[str, Any]:
        consumed = self._step * self._order.global_batch
        return {"consumed": consumed, "order": self._order.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `consumed` samples; nothing before them is read.

        Raises:
            ArtifactError: the state is of another order.
        """
        for key, value in self._order.describe().items():
            if state["order"].get(key) != value:
                raise ArtifactError(
                    f"the state was taken in an order with `{key}` {state['order'].get(key)!r}, "
                    f"this one has {value!r}"
                )
        self._seek(state["consumed"] // self._order.global_batch)

    def _seek(self, step: int) -> None:
        """Continue at a step."""
        if self._next is not None:
            self._next.exception()  # wait: it uses what is replaced here
        self._step, self._next = step, None

    def close(self) -> None:
        """Stop assembling."""
        self._thread.shutdown(cancel_futures=True)


class TokenStream(OrderedStream):
    """The sequences of one worker's lanes, from windows of parts.

    A batch raises ArtifactError as `PartReader.read`, or for a token id that the vocabulary does
    not have.

    Args:
        fetch: reads the windows.
        names: by data set, the source of tokens of parts without `documents`.
        vocab_size: token ids have to be below it.
        signals: further columns of the batches.
    """

    def __init__(
        self,
        order: SampleOrder,
        fetch: Fetch,
        *,
        rank: int = 0,
        num_workers: int = 1,
        names: Sequence[str] = ("data",),
        num_steps: int | None = None,
        vocab_size: int | None = None,
        signals: Sequence[str] = (),
    ) -> None:
        super().__init__(order, rank=rank, num_workers=num_workers, num_steps=num_steps)
        self._fetch, self._names = fetch, names
        self._vocab_size, self._signals = vocab_size, signals
        self._seek(0)

    def close(self) -> None:
        self._thread.submit(self._tables.close).result()
        super().close()

    def _seek(self, step: int) -> None:
        super()._seek(step)
        self._windows = self._order.windows(self._lanes, step, self._num_steps)
        self._tables: Any = self._fetch(self._order.windows(self._lanes, step, self._num_steps))
        self._loaded: dict[tuple[int, int, int], _Loaded] = {}
        self._current: dict[tuple[int, int], _Loaded] = {}

    def _assemble(self, step: int) -> Batch:
        width = self._order.rows_per_lane
        taken: list[_Taken] = []
        for i, lane in enumerate(self._lanes):
            datasets, positions = self._order.mixture.draws(lane, step * width, width)
            for dataset in np.unique(datasets).tolist():
                mine = np.flatnonzero(datasets == dataset)
                taken += self._take(dataset, lane, positions[mine], i * width + mine)
        return _batch(taken)

    def _take(
        self, dataset: int, lane: int, positions: NDArray[np.int64], places: NDArray[np.int64]
    ) -> Iterator[_Taken]:
        """The rows at ascending `positions` of a data set's lane, with their `places`."""
        while len(positions):
            loaded = self._at(dataset, lane, int(positions[0]))
            inside = positions < loaded.window.end
            yield loaded, loaded.order[positions[inside] - loaded.window.start], places[inside]
            positions, places = positions[~inside], places[~inside]

    def _at(self, dataset: int, lane: int, position: int) -> _Loaded:
        """The window of a position; windows are loaded in the order of need."""
        loaded = self._current.get((dataset, lane))
        if loaded is None or position >= loaded.window.end:
            self._current.pop((dataset, lane), None)
            start = self._order.window_at(dataset, lane, position).start
            while (dataset, lane, start) not in self._loaded:
                window, table = next(self._windows), next(self._tables)
                key = window.dataset, window.lane, window.start
                self._loaded[key] = self._load(window, table)
            loaded = self._current[dataset, lane] = self._loaded.pop((dataset, lane, start))
        return loaded

    def _load(self, window: Window, table: pa.Table) -> _Loaded:
        pieces = read_pieces(table) if "documents" in table.column_names else None
        names = [self._names[window.dataset]] if pieces is None else pieces.sources
        samples = np.stack([table[name].to_numpy() for name in ("part", "row")], axis=1)
        ids = token_ids(table)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self._vocab_size is not None and high >= self._vocab_size):
            raise ArtifactError(
                f"data set {self._names[window.dataset]!r} has the token id "
                f"{low if low < 0 else high}, the tokenizer only {self._vocab_size} from 0 on: "
                "they were made with another one (`tokenizer`)"
            )
        signals = {name: self._signal(window, table, name, ids) for name in self._signals}
        return _Loaded(window, window.permutation(), ids, samples, signals, pieces, names)

    def _signal(
        self, window: Window, table: pa.Table, name: str, ids: NDArray[Any]
    ) -> NDArray[Any]:
        """A column as [n] or [n, m], the mask as float32; a missing mask is all ones."""
        if name not in table.column_names:
            if name == LOSS_MASK:
                return np.ones(ids.shape, np.float32)
            raise ArtifactError(
                f"data set {self._names[window.dataset]!r} has no column `{name}`, which the "
                "objective asks for (`train.objective`)"
            )
        column = table[name].combine_chunks()
        if pa.types.is_nested(column.type):
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        if name == LOSS_MASK or values.dtype in (np.bool_, np.float64):
            values = values.astype(np.float32)
        return values if len(values) == len(ids) else values.reshape(len(ids), -1)
