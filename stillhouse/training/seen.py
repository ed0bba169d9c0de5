"""What a model was trained on: the documents it has seen, by the digest of their file and row.

Kept beside the weights as `documents.parquet`: of each file (`file`, its sha256) ranges of rows
[`first`, `last`). Sequences of parts without `documents` are given by the part's digest and row.
With online selection, all candidates count as seen.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.storage.artifact import Manifest, load_manifest
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.parquet import open_part, parquet_bytes, read_table
from stillhouse.text.pieces import Grain, read_pieces
from stillhouse.training.order import SampleOrder
from stillhouse.training.task import TRAINED_ON, TokenSet, TrainTask

SEEN = "documents.parquet"
Rows = NDArray[np.int64]
Ranges = Mapping[str, NDArray[np.int64]]
"""By the digest of a file: ascending ranges of its rows, int64 [n, 2]."""


def sequences_seen(order: SampleOrder, num_steps: int) -> dict[int, Rows]:
    """The rows that the first steps of an order take, ascending, by the index of their part."""
    found: dict[int, list[Rows]] = {}
    draws = num_steps * order.rows_per_lane
    for dataset in range(order.num_datasets):
        taken = [order.mixture.num_drawn(dataset, lane, draws) for lane in range(order.lanes)]
        sizes = [order.lane_rows(dataset, lane) for lane in range(order.lanes)]
        once = all(n >= size for n, size in zip(taken, sizes, strict=True))
        for lane, count in enumerate(sizes if once else taken):
            position = 0
            while position < count:
                window = order.window_at(dataset, lane, position)
                samples = window.samples()
                if window.end > count:
                    samples = samples[window.permutation()[: count - window.start]]
                for part in np.unique(samples[:, 0]).tolist():
                    found.setdefault(part, []).append(samples[samples[:, 0] == part, 1])
                position = window.end
    return {part: np.unique(np.concatenate(rows)) for part, rows in sorted(found.items())}


def documents_seen(task: TrainTask, rank: int = 0, num_workers: int = 1) -> dict[str, Rows]:
    """The documents seen in a worker's share of the parts: rows by the digest of their file."""
    places = [(one, i) for one in task.data for i in range(len(one.uris))]
    manifests: dict[str, Manifest] = {}
    found: dict[str, list[Rows]] = {}
    sequences = list(sequences_seen(task.order(), task.num_steps).items())
    for part, rows in sequences[rank::num_workers]:
        data, index = places[part]
        rows = rows if data.chosen is None else data.chosen[index][rows]
        if data.tokens is not None and data.tokens not in manifests:
            with suppress(ArtifactError):  # gone: the parts' own digests are used
                manifests[data.tokens] = load_manifest(data.tokens, "tokens")
        for file, mine in _documents(data, index, rows, manifests):
            found.setdefault(file, []).append(mine)
    return {file: np.unique(np.concatenate(rows)) for file, rows in found.items()}


def _documents(
    data: TokenSet, index: int, rows: Rows, manifests: Mapping[str, Manifest]
) -> Iterator[tuple[str, Rows]]:
    """The documents of some rows of a part: digest of a file, and rows in it."""
    with open_part(data.uris[index]) as part:
        names = part.schema_arrow.names
        if (data.tokens or "") not in manifests or "documents" not in names:
            yield data.digests[index], rows
            return
        table = part.read([name for name in ("documents", "part") if name in names]).take(rows)
    tokens = manifests[data.tokens or ""]
    files = file_digests(tokens)
    pieces = read_pieces(table)
    if "part" in names:  # a selection: its rows come from many parts of the pool
        owners = table["part"].to_numpy()[pieces.sequence]
    else:
        digests = [ref.sha256 for ref in tokens.parts]
        owners = np.full(len(pieces.file), digests.index(data.digests[index]))
    for owner in np.unique(owners).tolist():
        for file in np.unique(pieces.file[owners == owner]).tolist():
            mine = (owners == owner) & (pieces.file == file)
            yield files[owner][file], np.unique(pieces.row[mine])


def file_digests(tokens: Manifest) -> list[list[str]]:
    """Digests of the raw files from which each part of a tokens artifact was packed."""
    return [
        [file["sha256"] for file in unit["files"]]
        for unit in tokens.inputs["units"]
        for _ in range(unit["parts"])
    ]


def seen_bytes(shares: Sequence[Mapping[str, Rows]]) -> bytes:
    """`documents.parquet`, from the rows of all workers."""
    files: list[str] = []
    ranges: list[NDArray[np.int64]] = []
    for file in sorted({name for share in shares for name in share}):
        rows = np.unique(np.concatenate([share[file] for share in shares if file in share]))
        breaks = np.flatnonzero(np.diff(rows) > 1)
        first = rows[np.concatenate([[0], breaks + 1])]
        last = rows[np.concatenate([breaks, [len(rows) - 1]])] + 1
        ranges.append(np.stack([first, last], axis=1))
        files += [file] * len(first)
    both = np.concatenate([np.zeros((0, 2), np.int64), *ranges])
    names = pa.array(files, pa.string()).dictionary_encode()
    columns = {"file": names, "first": both[:, 0], "last": both[:, 1]}
    return parquet_bytes(pa.table(columns))


def read_seen(folder: str) -> Ranges:
    """The documents that a model has seen; empty if its folder has no `documents.parquet`."""
    if SEEN not in list_names(folder):
        return {}
    table = read_table(join(folder, SEEN))
    names = table["file"].combine_chunks()
    both = np.stack([table[name].to_numpy() for name in ("first", "last")], axis=1)
    index = names.indices.to_numpy()
    return {file: both[index == i] for i, file in enumerate(names.dictionary.to_pylist())}


def trained_rows(folder: str, parts: Collection[str]) -> tuple[dict[str, Rows], Ranges]:
    """What a model has seen of a pool's token parts, as far as its folder tells.

    Args:
        parts: sha256 of the parts.

    Returns:
        Rows by part; and the documents seen, which may be in further rows: none if the model was
        trained on rows of these very parts.
    """
    found: dict[str, Rows] = {}
    if TRAINED_ON in list_names(folder):
        table = read_table(join(folder, TRAINED_ON))
        names = table["part"].combine_chunks()
        index, rows = names.indices.to_numpy(), table["row"].to_numpy()
        digests = names.dictionary.to_pylist()
        found = {s: np.sort(rows[index == i]) for i, s in enumerate(digests)}
        if found.keys() <= set(parts):
            return found, {}
    seen = read_seen(folder)
    here = {part: rows for part, rows in found.items() if part in parts}
    for part in seen.keys() & set(parts):
        ranges = [np.arange(first, last) for first, last in seen[part].tolist()]
        here[part] = np.unique(np.concatenate(ranges))
    return here, seen


def add_rows(found: dict[str, Rows], part: str, rows: Rows) -> None:
    """Add rows of a part to those in `found`."""
    both = np.union1d(found.get(part, np.zeros(0, np.int64)), rows)
    if len(both):
        found[part] = both


def trained_on_bytes(sets: Sequence[TokenSet]) -> bytes | None:
    """`trained_on.parquet`: the chosen rows of token parts; None if whole parts were used."""
    chosen = [
        (digest, rows)
        for one in sets
        for digest, rows in zip(one.digests, one.chosen or (), strict=False)
    ]
    if not chosen:
        return None
    names = np.repeat([digest for digest, _ in chosen], [len(rows) for _, rows in chosen])
    rows = np.concatenate([rows for _, rows in chosen])
    return parquet_bytes(pa.table({"part": pa.array(names).dictionary_encode(), "row": rows}))


def rows_with(uri: str, files: Sequence[str], seen: Ranges, grain: Grain = "sequences") -> Rows:
    """Rows of a token part (its documents by number, with that grain) that hold a piece of a seen
    document; `files` as `file_digests`.
    """
    with open_part(uri) as part:
        pieces = read_pieces(part.read(["documents"]))
    hit = np.zeros(len(pieces.file), np.bool_)
    for index, file in enumerate(files):
        if file in seen:
            hit |= (pieces.file == index) & in_ranges(pieces.row, seen[file])
    return np.unique((pieces.owners() if grain == "documents" else pieces.sequence)[hit])


def in_ranges(rows: Rows, ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows lie in one of some ascending ranges, int64 [n, 2]."""
    at = np.searchsorted(ranges[:, 0], rows, side="right") - 1
    return (at >= 0) & (rows < ranges[np.maximum(at, 0), 1])
