"""`text`: JSON Lines or Parquet, a row a sample, with its text and score.

A sequence's text is its tokens decoded, EOS between documents included; its special tokens are
those of its tokenizer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from stillhouse.errors import ArtifactError
from stillhouse.export.shards import Exported, Shard, ShardReceipt, write_parquet

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
            write_parquet(path, (text_rows(source, table) for table in shard.tables()))
            return {}
        with open(path, "w", encoding="utf-8") as file:
            for table in shard.tables():
                for row in text_rows(source, table).to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {}

    def finish(self, source: Exported, to: str, shards: list[ShardReceipt]) -> dict[str, bytes]:
        """Nothing: the files are all there is."""
        return {}


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
        from stillhouse.selection.carried import with_text

        table = with_text(table, source.tokenizer, source.eos_token)
    names = [name for name in table.column_names if name not in _LEFT_OUT]
    first = [name for name in ("sample", "id", "text") if name in names]
    return table.select([*first, *(name for name in names if name not in first)])
