"""Writing a selection: each output part takes a keyed group of input parts and keeps their rows.

The groups come from a keyed permutation of all input parts, the rows of a group are ordered by a
keyed hash of their address. So every input part is read once, a group is the unit of retry, rows
near each other come from all over the pool, and nothing depends on the number of workers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.data_settings import PoolSource
from stillhouse.selection.budget import Cut
from stillhouse.selection.carried import with_columns, with_text
from stillhouse.selection.ledger import OwnedTokens, Tally, tally_part
from stillhouse.selection.quotas import QuotaCut, Sources
from stillhouse.selection.ranking import LOSS_COLUMNS, PartRanks, PartScores, Span, row_keys
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import Output, Place, Task
from stillhouse.text.documents import Document, read_documents
from stillhouse.text.duplicates import keyed_uniform
from stillhouse.text.pieces import Grain, Pieces, read_pieces, row_sources
from stillhouse.text.tasks import UnitFile


@dataclass(frozen=True, slots=True)
class Member:
    """One input part of a group.

    Attributes:
        index: of the part in the pool.
        ranks: its rows under the rule.
        files: raw files of its unit, which documents are read from.
    """

    index: int
    tokens: PartRef
    ranks: PartRanks
    files: tuple[UnitFile, ...]


@dataclass(frozen=True)
class WriteTask(Task):
    """Write one part of a selection: keep and order the rows of a group of input parts.

    The receipt carries the group's tally.

    Attributes:
        selection: fingerprint of the selection, which covers all that decides its rows.
        number: of the part.
        span, loss_span: ends of the tally's histograms.
        tokenizer: folder and EOS, where sequences get their text.
    """

    KIND = "selections"
    VERSION = 2

    selection: str
    number: int
    span: Span
    loss_span: Span
    members: Place[tuple[Member, ...]]
    grain: Place[Grain]
    cut: Place[Cut | QuotaCut]
    sources: Place[Sources]
    source: Place[PoolSource]
    tokenizer: Place[tuple[str, str | None] | None]
    seed: Place[int]

    def path(self, number: int) -> str:
        return f"selections/{self.selection}/part-{self.number:05d}.parquet"

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        tally = Tally()
        tables: list[pa.Table] = []
        order: list[NDArray[np.float64]] = []
        for member in self.members:
            tokens = read_table(store.path(member.tokens.path))
            pieces = read_pieces(tokens)
            scores = member.ranks.read(store)
            codes = self.sources.codes(pieces.sources)
            owned = OwnedTokens(
                row_source=codes[row_sources(pieces, self.grain)],
                piece_row=pieces.owners() if self.grain == "documents" else pieces.sequence,
                piece_source=codes[pieces.source],
                piece_tokens=pieces.num_tokens,
                labels=self.sources.labels,
            )
            kept = self.cut.mask(member.index, scores.value, owned.row_source)
            part = tally_part(
                member.index,
                member.tokens.path,
                scores,
                kept,
                self.cut.score,
                owned=owned,
                span=self.span,
                loss_span=self.loss_span,
            )
            tally.add(part)
            rows = np.flatnonzero(kept)
            tables.append(self._rows(member, tokens, pieces, scores, rows))
            order.append(keyed_uniform(row_keys(member.tokens.sha256, len(kept))[rows], self.seed))
        table = pa.concat_tables(tables)
        table = table.take(pa.array(np.argsort(np.concatenate(order), kind="stable")))
        counts = {"tokens": tally.fate_tokens["kept"]}
        return Output([table], counts, {"tally": tally.to_json()})

    def tokens_in(self, table: pa.Table) -> int:
        if "num_tokens" in table.column_names:
            return int(table["num_tokens"].to_numpy().sum())
        return table.num_rows * table.schema.field("input_ids").type.list_size

    def _rows(
        self,
        member: Member,
        tokens: pa.Table,
        pieces: Pieces,
        scores: PartScores,
        rows: NDArray[np.int64],
    ) -> pa.Table:
        """The kept rows with their score, the losses, and their address in the pool."""
        if self.grain == "documents":
            table = _documents(member, pieces, rows, self.source)
        else:
            table = tokens.take(pa.array(rows))
            if self.tokenizer is not None:
                table = with_text(table, *self.tokenizer)
        if self.source.keep_columns:
            table = with_columns(table, member.files, self.source)
        table = table.append_column("score", pa.array(scores.raw[rows]))
        for name in LOSS_COLUMNS:
            if name in scores.losses:
                table = table.append_column(f"{name}_nll", pa.array(scores.losses[name][rows]))
        part = pa.array(np.full(len(rows), member.index, np.int32))
        return table.append_column("part", part).append_column("row", pa.array(rows, pa.int64()))


def group_parts(
    fingerprints: Sequence[str], kept_rows: Sequence[int], part_rows: int, seed: int
) -> list[list[int]]:
    """Cut a keyed permutation of input parts into groups of about `part_rows` kept rows each.

    Args:
        fingerprints: of the input parts, in order.
        kept_rows: how many rows of each are kept.
        part_rows: rows an output part should have.

    Returns:
        Indices of the input parts of each group.
    """

    def key(index: int) -> bytes:
        return hashlib.sha256(f"{fingerprints[index]}:{seed}".encode()).digest()

    groups: list[list[int]] = [[]]
    filled = 0
    for index in sorted(range(len(fingerprints)), key=key):
        if groups[-1] and filled + kept_rows[index] > part_rows:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += kept_rows[index]
    return groups


def _documents(
    member: Member, pieces: Pieces, rows: NDArray[np.int64], source: PoolSource
) -> pa.Table:
    """Whole documents; their text is read again from the raw files."""
    owners = pieces.owners()
    first = np.searchsorted(owners, rows)
    tokens = np.bincount(owners, pieces.num_tokens)[rows].astype(np.int64)
    file, raw = pieces.file[first], pieces.row[first]
    texts: dict[tuple[int, int], str] = {}
    for index in np.unique(file):
        wanted = sorted(int(r) for r in raw[file == index])
        place = member.files[index]
        for item in read_documents(
            place.uri,
            file=int(index),
            name=place.digest[:12],
            settings=source,
            rows=wanted,
            label=place.label,
        ):
            if isinstance(item, Document):
                texts[int(index), item.row] = item.text
    return pa.table(
        {
            "id": pieces.ids.take(pa.array(first)),
            "text": pa.array(
                [texts[int(f), int(r)] for f, r in zip(file, raw, strict=True)], pa.string()
            ),
            "source": pa.array([pieces.sources[i] for i in pieces.source[first]], pa.string()),
            "num_tokens": pa.array(tokens),
            "raw_file": pa.array(file),
            "raw_row": pa.array(raw),
        }
    )
