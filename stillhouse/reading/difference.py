"""What two selections keep in common, and what only one of them keeps.

Rows are told apart by content: a sequence by its token part's digest and its row there, a document
by its raw file's digest and its row there. Sequences of two selections are compared where both were
cut by the same tokenizer in the same length; otherwise the documents that they are from are.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import Selection, part_files
from stillhouse.storage.commit import copy
from stillhouse.storage.filesystem import absolute_uri
from stillhouse.text.pieces import Grain, read_pieces

_ROW_BITS = 40
"""A key is the number of a part or file, shifted, and a row: parts have fewer than 10^12 rows."""
_INPUTS = ("tokens", "scores", "prior_rows", "contamination", "benchmarks", "taken_down")
Side = Literal["a", "b"]
_TEXTS = ("side", "id", "source", "file")
_ROWS = pa.schema(
    [*((name, pa.string()) for name in _TEXTS), ("row", pa.int64()), ("score", pa.float32())]
)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Pieces of documents of some kept rows, p of them.

    Attributes:
        key: uint64 [p], of the row or document.
        tokens, score: of the piece and of its row.
        part, file, row: int [p], the token part, and the raw file of its unit and the row there.
        source: int [p], index into `sources`.
    """

    key: NDArray[np.uint64]
    tokens: NDArray[np.int64]
    score: NDArray[np.float32]
    part: NDArray[np.int64]
    file: NDArray[np.int32]
    row: NDArray[np.int64]
    id: pa.Array
    source: NDArray[np.int32]
    sources: list[str]


class _Kept(NamedTuple):
    """Sorted keys of what a selection keeps, each once, and the score of each."""

    keys: NDArray[np.uint64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Side:
    """A selection, and the numbers of its token parts and raw files in keys."""

    selection: Selection
    unit: Grain
    parts: NDArray[np.uint64]
    files: list[NDArray[np.uint64]]
    uris: list[list[str]]

    def batches(self) -> Iterator[_Batch]:
        grain = self.selection.manifest.settings["grain"]
        columns = {"sequences": "documents", "documents": "id source num_tokens raw_file raw_row"}
        names = columns[grain].split()
        for batch in self.selection.to_arrow([*names, "score", "part", "row"]):
            table = pa.Table.from_batches([batch])
            yield self._documents(table) if grain == "documents" else self._pieces(table)

    def _documents(self, table: pa.Table) -> _Batch:
        part, file, row = (table[name].to_numpy() for name in ("part", "raw_file", "raw_row"))
        source = table["source"].combine_chunks().dictionary_encode()
        return _Batch(
            key=self._document_keys(part, file, row),
            tokens=table["num_tokens"].to_numpy(),
            score=table["score"].to_numpy(),
            part=part,
            file=file,
            row=row,
            id=table["id"].combine_chunks(),
            source=source.indices.to_numpy(),
            sources=source.dictionary.to_pylist(),
        )

    def _pieces(self, table: pa.Table) -> _Batch:
        pieces = read_pieces(table)
        part = table["part"].to_numpy()[pieces.sequence]
        if self.unit == "documents":
            key = self._document_keys(part, pieces.file, pieces.row)
        else:
            row = table["row"].to_numpy().astype(np.uint64)[pieces.sequence]
            key = (self.parts[part] << np.uint64(_ROW_BITS)) | row
        return _Batch(
            key=key,
            tokens=pieces.num_tokens,
            score=table["score"].to_numpy()[pieces.sequence],
            part=part,
            file=pieces.file,
            row=pieces.row,
            id=pieces.ids,
            source=pieces.source,
            sources=pieces.sources,
        )

    def _document_keys(self, part: Any, file: Any, row: Any) -> NDArray[np.uint64]:
        number = np.zeros(len(part), np.uint64)
        for one in np.unique(part):
            here = part == one
            number[here] = self.files[one][file[here]]
        return (number << np.uint64(_ROW_BITS)) | row.astype(np.uint64)

    def kept(self) -> _Kept:
        """All keys; the score of a document is the best one of its rows."""
        batches = [(batch.key, batch.score) for batch in self.batches()]
        keys, scores = (np.concatenate(column) for column in zip(*batches, strict=True))
        order = np.lexsort((-scores, keys))
        found, index = np.unique(keys[order], return_index=True)
        return _Kept(found, scores[order][index])


def compare(a: Selection, b: Selection, rows_to: str | None = None) -> dict[str, Any]:
    """Compare two selections, of one store or of two.

    Args:
        rows_to: a path or URI for a Parquet file of the documents of rows that only one keeps:
            `side`, `id`, `source`, raw `file` and `row`, `score`.

    Returns:
        The object that `diff --json` prints.

    Raises:
        ArtifactError: one of them is empty, or its tokens are no longer in its store.
    """
    for one in (a, b):
        if not one.num_rows:
            raise ArtifactError(f"{one.uri} is empty")
    sides = _sides(a, b)
    kept: dict[Side, _Kept] = {name: side.kept() for name, side in sides.items()}
    in_both = np.intersect1d(kept["a"].keys, kept["b"].keys, assume_unique=True)
    if rows_to is not None:
        _write_rows(sides, in_both, absolute_uri(rows_to))
    counts = {name: len(one.keys) for name, one in kept.items()}
    union = sum(counts.values()) - len(in_both)
    return {
        "a": _summary(a),
        "b": _summary(b),
        "unit": sides["a"].unit,
        "kept": counts
        | {"both": len(in_both)}
        | {f"only_{name}": count - len(in_both) for name, count in counts.items()},
        "jaccard": len(in_both) / union,
        "rank_correlation": _rank_correlation(kept, in_both),
        "mean_score": _mean_scores(kept, in_both),
        "sources": _tokens_by_source(sides, in_both),
        "settings": _differing(a, b),
    }


def _sides(a: Selection, b: Selection) -> dict[Side, _Side]:
    """Both with the same numbers for the same content."""
    cuts = [
        (one.tokens.settings["tokenizer"]["digest"], one.tokens.settings["sequence_length"])
        for one in (a, b)
    ]
    grains = {one.manifest.settings["grain"] for one in (a, b)}
    unit: Grain = "sequences" if grains == {"sequences"} and cuts[0] == cuts[1] else "documents"
    numbers: dict[str, int] = {}

    def numbered(digests: Iterable[str]) -> NDArray[np.uint64]:
        return np.array([numbers.setdefault(one, len(numbers)) for one in digests], np.uint64)

    def side(one: Selection) -> _Side:
        files = part_files(one.tokens)
        return _Side(
            selection=one,
            unit=unit,
            parts=numbered(part.sha256 for part in one.tokens.parts),
            files=[numbered(file["sha256"] for file in each) for each in files],
            uris=[[file["uri"] for file in each] for each in files],
        )

    return {"a": side(a), "b": side(b)}


def _tokens_by_source(
    sides: dict[Side, _Side], in_both: NDArray[np.uint64]
) -> list[dict[str, Any]]:
    """Tokens by source: of all that each side keeps, and of what it alone keeps."""
    sources: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, side in sides.items():
        for batch in side.batches():
            alone = ~_among(batch.key, in_both)
            for code, label in enumerate(batch.sources):
                here = batch.source == code
                sources[label][f"{name}_tokens"] += int(batch.tokens[here].sum())
                sources[label][f"{name}_only_tokens"] += int(batch.tokens[here & alone].sum())
    columns = [f"{name}{only}_tokens" for name in sides for only in ("", "_only")]
    return [
        {"source": label} | {column: row[column] for column in columns}
        for label, row in sorted(sources.items())
    ]


def _mean_scores(kept: dict[Side, _Kept], in_both: NDArray[np.uint64]) -> dict[str, float | None]:
    """Of what both keep and of what one alone keeps, by the scores of each; None where nothing."""
    means: dict[str, float | None] = {}
    for name, one in kept.items():
        common = _among(one.keys, in_both)
        for kind, mask in (("both", common), ("only", ~common)):
            chosen = one.scores[mask].astype(np.float64)
            means[f"{name}_{kind}"] = float(chosen.mean()) if len(chosen) else None
    return means


def _among(keys: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which keys are among `known`, which are sorted."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return known[place] == keys


def _rank_correlation(kept: dict[Side, _Kept], in_both: NDArray[np.uint64]) -> float | None:
    """Spearman's, of the two scores of what both keep; None where one of them does not vary."""
    ranks: list[NDArray[np.float64]] = []
    for one in kept.values():
        scores = one.scores[np.searchsorted(one.keys, in_both)]
        values, place, count = np.unique(scores, return_inverse=True, return_counts=True)
        if len(values) < 2:
            return None
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])  # ties share their mean rank
    return float(np.asarray(np.corrcoef(np.stack(ranks)))[0, 1])


def _write_rows(sides: dict[Side, _Side], in_both: NDArray[np.uint64], to: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        with pq.ParquetWriter(path, _ROWS, compression="zstd") as writer:
            for name, side in sides.items():
                for batch in side.batches():
                    alone = np.flatnonzero(~_among(batch.key, in_both))
                    parts, files = batch.part[alone].tolist(), batch.file[alone].tolist()
                    columns = {
                        "side": [name] * len(alone),
                        "id": batch.id.take(pa.array(alone)),
                        "source": [batch.sources[code] for code in batch.source[alone].tolist()],
                        "file": [side.uris[p][f] for p, f in zip(parts, files, strict=True)],
                        "row": batch.row[alone],
                        "score": batch.score[alone],
                    }
                    writer.write_table(pa.table(columns, schema=_ROWS))
        copy(str(path), to)


def _summary(one: Selection) -> dict[str, Any]:
    return {
        "selection": one.uri,
        "rows": one.num_rows,
        "tokens": one.num_tokens,
        "threshold": one.threshold,
    }


def _differing(a: Selection, b: Selection) -> dict[str, list[Any]]:
    """Settings and inputs that differ: the value of a, and that of b."""
    values = [
        one.manifest.settings | {name: one.manifest.inputs.get(name) for name in _INPUTS}
        for one in (a, b)
    ]
    names = {**values[0], **values[1]}
    pairs = {name: [one.get(name) for one in values] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
