"""Cutting a selection into shards, and writing one of them."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import open_selection, part_files
from stillhouse.storage.artifact import Part
from stillhouse.storage.commit import copy, create
from stillhouse.storage.filesystem import join, list_names, read_many
from stillhouse.storage.parquet import ROW_GROUP, open_part
from stillhouse.storage.sealed import seal, unseal
from stillhouse.text.pieces import Grain, read_pieces, token_ids, with_piece_fields

PROVENANCE = "provenance"
"""The folder of the receipts, and of a Parquet file a shard: a row for each sample."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The selection that is exported, and what a format has to know about it.

    Attributes:
        uri: of its folder; `store`: of its store.
        fingerprint: of the selection.
        grain: what a row is: a sequence of `sequence_length` tokens, or a document.
        vocab_size: ids are smaller than this.
        eos_token: between documents.
        tokenizer: its folder; None if it is no longer there.
        about: settings and numbers of the selection, for people.
    """

    uri: str
    store: str
    fingerprint: str
    grain: Grain
    sequence_length: int
    vocab_size: int
    eos_token: str
    tokenizer: str | None
    about: dict[str, Any]

    @property
    def id_type(self) -> np.dtype[Any]:
        """The smallest of uint16 and uint32 that holds all ids."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive parts of the selection: `number` of `count`, from sample `start` on."""

    number: int
    count: int
    start: int
    parts: tuple[Part, ...]

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    def tables(self) -> Iterator[pa.Table]:
        """Its rows, a row group at a time, with their number in the selection as `sample`."""
        start = self.start
        for part in self.parts:
            with open_part(part.uri) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, use_threads=False)
                    numbers = np.arange(start, start + table.num_rows)
                    yield table.add_column(0, "sample", pa.array(numbers))
                    start += table.num_rows


class Format(Protocol):
    """How samples are written.

    Attributes:
        name: in `--format`.
        shard_tokens: how many a shard has, unless the user says.
        takes_documents: whether rows may be documents (text) instead of tokens.
    """

    name: str
    shard_tokens: int
    takes_documents: bool

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """Write a shard's files into an empty folder.

        Returns:
            What `finish` has to know of the shard, as JSON.
        """
        ...

    def finish(self, source: Exported, to: str, shards: list["ShardReceipt"]) -> dict[str, bytes]:
        """Files that are written when all shards are there: contents by name.

        Args:
            to: the URI of the export.
            shards: all receipts, in order.
        """
        ...


@dataclass(frozen=True, slots=True)
class ShardReceipt:
    """A finished shard: its samples, tokens, the SHA-256 and size of each file; `info` is the
    format's.
    """

    number: int
    num_samples: int
    num_tokens: int
    digests: dict[str, str]
    bytes: dict[str, int]
    info: dict[str, Any]


def cut_shards(parts: list[Part], shard_tokens: int) -> list[Shard]:
    """Groups of consecutive parts of about `shard_tokens` tokens; a larger part is alone."""
    groups: list[list[Part]] = []
    filled = shard_tokens
    for part in parts:
        if filled + part.num_tokens > shard_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.num_tokens
    rows = [sum(part.num_rows for part in group) for group in groups]
    starts = np.cumsum([0, *rows]).tolist()
    return [Shard(n, len(groups), starts[n], tuple(g)) for n, g in enumerate(groups)]


def write_shard(source: Exported, form: Format, to: str, shard: Shard) -> ShardReceipt:
    """Write one shard of an export and its receipt; the same bytes whenever it is repeated."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-export-") as made:
        folder = Path(made)
        info = form.write(source, shard, folder)
        place = folder / PROVENANCE / f"{shard.name}.parquet"
        place.parent.mkdir(exist_ok=True)
        files = _raw_files(source.uri)
        write_parquet(place, (_with_uris(table, files) for table in shard.tables()))
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        digests = {name: copy(str(path), join(to, name)) for name, path in names.items()}
        sizes = {name: path.stat().st_size for name, path in names.items()}
    receipt = ShardReceipt(shard.number, shard.num_rows, shard.num_tokens, digests, sizes, info)
    create(join(to, PROVENANCE, f"{shard.name}.json"), seal(asdict(receipt)))
    return receipt


def finished_shards(to: str) -> dict[int, ShardReceipt]:
    """The receipts of the shards whose files all exist, by number."""
    names = [name for name in list_names(join(to, PROVENANCE)) if name.endswith(".json")]
    uris = [join(to, PROVENANCE, name) for name in names]
    found = [ShardReceipt(**unseal(data, u)) for data, u in zip(read_many(uris), uris, strict=True)]
    folders = {name.rpartition("/")[0] for receipt in found for name in receipt.digests}
    there = {
        f"{folder}/{name}".lstrip("/")
        for folder in folders
        for name in list_names(join(to, folder) if folder else to)
    }
    return {one.number: one for one in found if there.issuperset(one.digests)}


@lru_cache(maxsize=1)
def _raw_files(selection: str) -> list[list[str]]:
    """URIs of the raw files of each token part that a selection is from."""
    manifest = open_selection(selection).tokens
    return [[file["uri"] for file in files] for files in part_files(manifest)]


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema, at least one, as a Parquet file, a row group or more each."""
    writer: pq.ParquetWriter | None = None
    for table in tables:
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=ROW_GROUP)
    if writer is None:
        raise ArtifactError("there is nothing to export: a shard has no rows")
    writer.close()


def _with_uris(table: pa.Table, files: list[list[str]]) -> pa.Table:
    """Where each sample comes from: a selection's rows without tokens and text, with the URIs of
    raw files, which are numbers.
    """
    left_out = [name for name in ("input_ids", "text") if name in table.column_names]
    table = table.drop_columns(left_out)
    part = table["part"].to_numpy()
    if "raw_file" in table.column_names:
        uris = _uris(part, table["raw_file"].to_numpy(), files)
        return table.set_column(table.column_names.index("raw_file"), "raw_file", uris)
    pieces = read_pieces(table)
    return with_piece_fields(table, {"file": _uris(part[pieces.sequence], pieces.file, files)})


def _uris(part: Any, file: Any, files: list[list[str]]) -> pa.Array:
    """The URI of each (token part, file of its unit)."""
    pairs = zip(part.tolist(), file.tolist(), strict=True)
    return pa.array([files[p][f] for p, f in pairs], pa.string())


def ids_of(table: pa.Table, source: Exported) -> Any:
    """`input_ids` [n, T] of a row group, in the export's type."""
    return token_ids(table).astype(source.id_type, copy=False)
