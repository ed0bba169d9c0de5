"""`tokens`: NumPy arrays of packed sequences, a file a shard, `numpy.load(..., mmap_mode="r")`."""

from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.export.shards import Exported, Shard, ShardReceipt, ids_of


class Tokens:
    """`tokens-00000.npy`, ...: uint16 [N, T], or uint32 for vocabularies above 65,536."""

    name = "tokens"
    shard_tokens = 2**28
    takes_documents = False

    def write(self, source: Exported, shard: Shard, folder: Path) -> dict[str, Any]:
        """See `Format.write`."""
        header = {
            "descr": np.lib.format.dtype_to_descr(source.id_type),
            "fortran_order": False,
            "shape": (shard.num_rows, source.sequence_length),
        }
        with open(folder / f"tokens-{shard.name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for table in shard.tables():
                file.write(ids_of(table, source).tobytes())
        return {}

    def finish(self, source: Exported, to: str, shards: list[ShardReceipt]) -> dict[str, bytes]:
        """Nothing: the files are all there is."""
        return {}
