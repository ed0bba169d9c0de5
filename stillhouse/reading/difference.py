"""What two selections keep in common, and what only one of them keeps.

Rows are told apart by content: a sequence by its token part's digest and its row there, a document
by its raw file's digest and its row there. Sequences of two selections are compared where both were
cut by the same tokenizer in the same length; otherwise the documents that they are from are.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import Selection, part_files
from stillhouse.storage.artifact import load_manifest
from stillhouse.storage.commit import copy
from stillhouse.storage.filesystem import absolute_uri, join
from stillhouse.text.pieces import Grain

_ROW_BITS = 40
"""A key is the number of a part or file, shifted, and a row: parts have fewer than 10^12 rows."""
_INPUTS = ("tokens", "scores", "prior_rows", "contamination")
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
    """

    key: NDArray[np.uint64]
    tokens: NDArray[np.int64]
    score: NDArray[np.float32]
    part: NDArray[np.int64]
    file: NDArray[np.int64]
    row: NDArray[np.int64]
    id: pa.Array
    source: pa.Array


@dataclass
class _Side:
    """A selection, and the numbers of its token parts and raw files in keys."""

    selection: Selection
    unit: Grain
    parts: NDArray[np.uint64]
    files: list[NDArray[np.uint64]]
    uris: list[list[str]]
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    scores: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def batches(self) -> Iterator[_Batch]:
        grain = self.selection.manifest.settings["grain"]
        columns = {"sequences": "documents", "documents": "id source num_tokens raw_file raw_row"}
        names = columns[grain].split()
        for batch in self.selection.to_arrow([*names, "score", "part", "row"]):
            yield self._documents(batch) if grain == "documents" else self._pieces(batch)

    def _documents(self, batch: pa.RecordBatch) -> _Batch:
        part, file = (batch[name].to_numpy().astype(np.int64) for name in ("part", "raw_file"))
        row = batch["raw_row"].to_numpy()
        return _Batch(
            key=self._document_keys(part, file, row),
            tokens=batch["num_tokens"].to_numpy(),
            score=batch["score"].to_numpy(zero_copy_only=False),
            part=part,
            file=file,
            row=row,
            id=batch["id"],
            source=batch["source"],
        )

    def _pieces(self, batch: pa.RecordBatch) -> _Batch:
        column = batch["documents"]
        lengths = column.value_lengths().to_numpy()
        flat = column.flatten()
        fields = {name: flat.field(name) for name in ("id", "source", "start", "end")}
        file, row = (flat.field(n).to_numpy(zero_copy_only=False) for n in ("file", "row"))
        owner = np.repeat(np.arange(batch.num_rows), lengths)
        part = batch["part"].to_numpy().astype(np.int64)[owner]
        if self.unit == "documents":
            key = self._document_keys(part, file, row)
        else:
            key = self.parts[part] << np.uint64(_ROW_BITS)
            key |= batch["row"].to_numpy().astype(np.uint64)[owner]
        start, end = (fields[name].to_numpy(zero_copy_only=False) for name in ("start", "end"))
        return _Batch(
            key=key,
            tokens=(end - start).astype(np.int64),
            score=batch["score"].to_numpy(zero_copy_only=False)[owner],
            part=part,
            file=file.astype(np.int64),
            row=row,
            id=fields["id"],
            source=fields["source"],
        )

    def _document_keys(self, part: Any, file: Any, row: Any) -> NDArray[np.uint64]:
        number = np.zeros(len(part), np.uint64)
        for one in np.unique(part):
            here = part == one
            number[here] = self.files[one][file[here]]
        return (number << np.uint64(_ROW_BITS)) | row.astype(np.uint64)

    def read_keys(self) -> None:
        """Set `keys`, sorted, each once, and the score of each (the best of a document's rows)."""
        batches = [(batch.key, batch.score) for batch in self.batches()]
        keys, scores = (np.concatenate(column) for column in zip(*batches, strict=True))
        order = np.lexsort((-scores, keys))
        self.keys, index = np.unique(keys[order], return_index=True)
        self.scores = scores[order][index]


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
    for side in sides.values():
        side.read_keys()
    in_both = np.intersect1d(sides["a"].keys, sides["b"].keys, assume_unique=True)
    sources, means = _measured(sides, in_both)
    if rows_to is not None:
        _write_rows(sides, in_both, absolute_uri(rows_to))
    counts = {name: len(side.keys) for name, side in sides.items()}
    union = sum(counts.values()) - len(in_both)
    return {
        "a": _summary(a),
        "b": _summary(b),
        "unit": sides["a"].unit,
        "kept": counts
        | {"both": len(in_both)}
        | {f"only_{name}": count - len(in_both) for name, count in counts.items()},
        "jaccard": len(in_both) / union,
        "rank_correlation": _rank_correlation(sides, in_both),
        "mean_score": means,
        "sources": sources,
        "settings": _differing(a, b),
    }


def _sides(a: Selection, b: Selection) -> dict[Side, _Side]:
    """Both with the same numbers for the same content."""
    manifests = [
        load_manifest(join(one.store, "tokens", one.manifest.inputs["tokens"]), "tokens")
        for one in (a, b)
    ]
    cuts = [(m.settings["tokenizer"]["digest"], m.settings["sequence_length"]) for m in manifests]
    grains = {one.manifest.settings["grain"] for one in (a, b)}
    unit: Grain = "sequences" if grains == {"sequences"} and cuts[0] == cuts[1] else "documents"
    numbers: dict[str, int] = {}

    def number(digest: str) -> int:
        return numbers.setdefault(digest, len(numbers))

    found: list[_Side] = []
    for one, manifest in zip((a, b), manifests, strict=True):
        parts = np.array([number(part.sha256) for part in manifest.parts], np.uint64)
        files = part_files(manifest)
        found.append(
            _Side(
                one,
                unit,
                parts,
                [np.array([number(file["sha256"]) for file in unit], np.uint64) for unit in files],
                [[file["uri"] for file in unit] for unit in files],
            )
        )
    return {"a": found[0], "b": found[1]}


def _measured(
    sides: dict[Side, _Side], in_both: NDArray[np.uint64]
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Tokens by source (of all kept, and of those that one alone keeps), and mean scores."""
    sources: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    means: dict[str, float | None] = {}
    for name, side in sides.items():
        common = _among(side.keys, in_both)
        for kind, mask in (("both", common), ("only", ~common)):
            chosen = side.scores[mask].astype(np.float64)
            means[f"{name}_{kind}"] = float(chosen.mean()) if len(chosen) else None
        for batch in side.batches():
            alone = ~_among(batch.key, in_both)
            coded = batch.source.dictionary_encode()
            codes = coded.indices.to_numpy(zero_copy_only=False)
            for code, label in enumerate(coded.dictionary.to_pylist()):
                here = codes == code
                row = sources[label]
                row[f"{name}_tokens"] += int(batch.tokens[here].sum())
                row[f"{name}_only_tokens"] += int(batch.tokens[here & alone].sum())
    columns = [f"{name}{only}_tokens" for name in sides for only in ("", "_only")]
    table = [
        {"source": label} | {column: row[column] for column in columns}
        for label, row in sorted(sources.items())
    ]
    return table, means


def _among(keys: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which keys are among `known`, which are sorted."""
    if not len(known):
        return np.zeros(len(keys), np.bool_)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return known[place] == keys


def _rank_correlation(sides: dict[Side, _Side], in_both: NDArray[np.uint64]) -> float | None:
    """Spearman's, of the two scores of what both keep; None where one of them does not vary."""
    ranks: list[NDArray[np.float64]] = []
    for side in sides.values():
        scores = side.scores[np.searchsorted(side.keys, in_both)]
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
                        "source": batch.source.take(pa.array(alone)),
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
