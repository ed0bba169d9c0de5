"""`text`: JSON Lines or Parquet, a row a sample, with its text and score.

A sequence's text is its tokens decoded, EOS between documents included; its special tokens are
those of its tokenizer.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError
from stillhouse.export.shards import Exported, Shard, ShardReceipt
from stillhouse.storage.parquet import ROW_GROUP
from stillhouse.text.pieces import token_ids

Files = Literal["jsonl", "parquet"]
_LEFT_OUT = {"input_ids", "documents", "raw_file", "raw_row", "part", "row"}


@dataclass(frozen=True, slots=True)
class TextFiles:
    """`text-00000.jsonl` (or `.parquet`), ...: `sample`, `text`, `score` and the losses.

    Documents have `id`, `source`, `num_tokens` and the columns that were kept besides.
    """

    files: Files = "jsonl"
    name = "text"
    shard_tokens = 2**26
    takes_documents = True

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """See `Format.write`."""
        path = folder / f"text-{shard.name}.{self.files}"
        if self.files == "parquet":
            write_parquet(source, shard, path)
            return {}
        with open(path, "w", encoding="utf-8") as file:
            for table in shard.tables():
                for row in text_rows(source, table).to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {}

    def finish(self, source: Exported, to: str, shards: list[ShardReceipt]) -> dict[str, bytes]:
        """Nothing: the files are all there is."""
        return {}


def write_parquet(source: Exported, shard: Shard, path: Path) -> None:
    """The rows of `text_rows` as one Parquet file."""
    writer: pq.ParquetWriter | None = None
    for table in shard.tables():
        rows = text_rows(source, table)
        writer = writer or pq.ParquetWriter(path, rows.schema, compression="zstd")
        writer.write_table(rows, row_group_size=ROW_GROUP)
    if writer is not None:
        writer.close()


def text_rows(source: Exported, table: pa.Table) -> pa.Table:
    """Rows of a selection with `text`, without tokens and addresses in the pool.

    Raises:
        ArtifactError: sequences without text, whose tokenizer is no longer in the store.
    """
    if "text" not in table.column_names:
        if source.tokenizer is None:
            raise ArtifactError(
                f"the tokenizer of {source.uri} is not in its store: run its spec again, which "
                "puts it back, or select with `selection.text: true`"
            )
        decode = _decoder(source.tokenizer, source.eos_token)
        table = table.append_column("text", pa.array(map(decode, token_ids(table)), pa.string()))
    names = [name for name in table.column_names if name not in _LEFT_OUT]
    first = [name for name in ("sample", "id", "text") if name in names]
    return table.select([*first, *(name for name in names if name not in first)])


@lru_cache(maxsize=1)
def _decoder(folder: str, eos_token: str) -> Callable[[Any], str]:
    from stillhouse.text.tokenizer import load_tokenizer

    return load_tokenizer(folder, eos_token).decode
