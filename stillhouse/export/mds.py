"""`mds`: shards of MosaicML's StreamingDataset.

A shard is: the number of samples (uint32), where each begins and the last ends (uint32 [N + 1],
from the start of the file), its columns as JSON, and the samples. A sample is the sizes of its
columns of no fixed size (uint32 each), then their bytes in the order of their names.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stillhouse.errors import SpecError
from stillhouse.export.shards import Exported, Shard, ShardReceipt, ids_of
from stillhouse.export.text import text_rows

_MAX_BYTES = 2**32 - 1
INDEX = "index.json"


class Mds:
    """`shard.00000.mds`, ... and `index.json`.

    Sequences have `tokens` (an array of T ids), documents `id` and `text`.
    """

    name = "mds"
    shard_tokens = 2**25
    takes_documents = True

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """See `Format.write`."""
        columns = _columns(source)
        config = json.dumps(_config(columns), sort_keys=True).encode()
        path, body = folder / _name(shard.number), folder / "body"
        sizes: list[int] = []
        with open(body, "wb") as file:
            for table in shard.tables():
                for sample in _samples(source, table):
                    sizes.append(file.write(sample))
        first = 4 + 4 * (len(sizes) + 1) + len(config)
        ends = first + np.cumsum([0, *sizes], dtype=np.int64)
        if ends[-1] > _MAX_BYTES:
            raise SpecError(
                f"`--shard-tokens`: a shard of {ends[-1]:,} bytes is larger than MDS can address "
                f"({_MAX_BYTES:,}): give less"
            )
        with open(path, "wb") as file, open(body, "rb") as samples:
            file.write(np.uint32(len(sizes)).tobytes() + ends.astype(np.uint32).tobytes() + config)
            shutil.copyfileobj(samples, file)
        body.unlink()
        return {}

    def finish(self, source: Exported, to: str, shards: list[ShardReceipt]) -> dict[str, bytes]:
        """`index.json`, which names the shards."""
        config = _config(_columns(source))
        entries = [
            config
            | {
                "raw_data": {
                    "basename": _name(shard.number),
                    "bytes": shard.bytes[_name(shard.number)],
                    "hashes": {},
                },
                "samples": shard.num_samples,
                "zip_data": None,
            }
            for shard in shards
        ]
        return {INDEX: json.dumps({"shards": entries, "version": 2}, sort_keys=True).encode()}


def _name(number: int) -> str:
    return f"shard.{number:05d}.mds"


def _columns(source: Exported) -> dict[str, tuple[str, int | None]]:
    """Encoding and size in bytes (None: each sample's own) by name, sorted."""
    if source.grain == "documents":
        return {"id": ("str", None), "text": ("str", None)}
    length, kind = source.sequence_length, source.id_type
    return {"tokens": (f"ndarray:{kind.name}:{length}", length * kind.itemsize)}


def _config(columns: dict[str, tuple[str, int | None]]) -> dict[str, Any]:
    return {
        "column_encodings": [encoding for encoding, _ in columns.values()],
        "column_names": [*columns],
        "column_sizes": [size for _, size in columns.values()],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": None,
        "version": 2,
    }


def _samples(source: Exported, table: pa.Table) -> Any:
    if source.grain == "sequences":
        return (row.tobytes() for row in ids_of(table, source))
    rows = text_rows(source, table)
    texts = (rows[name].to_pylist() for name in _columns(source))
    return (_strings(values) for values in zip(*texts, strict=True))


def _strings(values: tuple[str, ...]) -> bytes:
    encoded = [value.encode() for value in values]
    return np.array([len(data) for data in encoded], np.uint32).tobytes() + b"".join(encoded)
