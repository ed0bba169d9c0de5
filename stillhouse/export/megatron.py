"""`megatron`: pairs of `.bin` and `.idx` as Megatron-LM's `IndexedDataset` reads them.

The index is: the magic bytes, version (uint64), type code (uint8), number of sequences and of
document borders (uint64 each), then the sequences' lengths (int32 [N]) and byte offsets (int64 [N])
and the borders (int64 [N + 1]). Each sample is a document of one sequence, so that Megatron's own
packing keeps it whole.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.export.shards import Exported, Shard, ShardReceipt, ids_of
from stillhouse.storage.filesystem import join

_MAGIC = b"MMIDIDX\x00\x00"
_INT32, _UINT16 = 4, 8
ARGUMENTS = "data_args.txt"


class Megatron:
    """`shard-00000.bin` and `.idx`, ...: ids as uint16, or int32 for vocabularies above 65,536."""

    name = "megatron"
    shard_tokens = 2**30
    takes_documents = False

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """See `Format.write`."""
        stored = source.id_type if source.id_type == np.uint16 else np.dtype(np.int32)
        length, count = source.sequence_length, shard.num_rows
        with open(folder / f"shard-{shard.name}.bin", "wb") as file:
            for table in shard.tables():
                file.write(ids_of(table, source).astype(stored, copy=False).tobytes())
        code = _UINT16 if stored == np.uint16 else _INT32
        with open(folder / f"shard-{shard.name}.idx", "wb") as file:
            file.write(_MAGIC + struct.pack("<QBQQ", 1, code, count, count + 1))
            file.write(np.full(count, length, np.int32).tobytes())
            file.write((np.arange(count, dtype=np.int64) * (length * stored.itemsize)).tobytes())
            file.write(np.arange(count + 1, dtype=np.int64).tobytes())
        return {}

    def finish(self, source: Exported, to: str, shards: list[ShardReceipt]) -> dict[str, bytes]:
        """`data_args.txt` for `--data-args-path`: each pair, weighted by its samples."""
        lines = [f"{s.num_samples} {join(to, f'shard-{s.number:05d}')}\n" for s in shards]
        return {ARGUMENTS: "".join(lines).encode()}
