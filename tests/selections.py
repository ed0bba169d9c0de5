"""A small selection made by hand: parts of 10, 7 and 4 sequences of 4 tokens."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, PartRef
from stillhouse.storage.commit import create, replace
from stillhouse.storage.filesystem import join
from stillhouse.storage.numbered import append
from stillhouse.text.packing import tokens_schema

SIZES = (10, 7, 4)
NUM_ROWS = sum(SIZES)
LENGTH = 4


def rows_table(first, count):
    """Sequence i holds the tokens 10 i, 10 i + 1, ... and has the score -i."""
    numbers = np.arange(first, first + count)
    ids = (10 * numbers[:, None] + np.arange(LENGTH)).astype(np.uint16)
    pieces = [
        [{"id": f"d{i}", "source": "web", "start": 0, "end": LENGTH, "file": i % 2, "row": i}]
        for i in numbers.tolist()
    ]
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), LENGTH),
            "documents": pa.array(pieces, tokens_schema(LENGTH, np.uint16).field("documents").type),
            "score": pa.array(-numbers, pa.float32()),
            "prior_nll": pa.array(numbers / 2, pa.float32()),
            "conditional_nll": pa.array(numbers * 1.5, pa.float32()),
            "part": pa.array((numbers >= 10).astype(np.int32)),
            "row": pa.array(numbers, pa.int64()),
        }
    )


def put_selection(store, sizes=SIZES):
    """Write the selection (row groups of 3 rows) and the tokens it came from; returns its URI."""
    parts = []
    for number, size in enumerate(sizes):
        buffer = io.BytesIO()
        table = rows_table(sum(sizes[:number]), size)
        pq.write_table(table, buffer, row_group_size=3)
        path, data = f"selections/s/part-{number:05d}.parquet", buffer.getvalue()
        create(store.path(path), data)
        parts.append(PartRef(path, size, size * LENGTH, len(data), sha256(data)))
    units = [
        {"task": f"t{i}", "parts": 1, "files": [{"uri": f"/pool/{i}{j}.jsonl"} for j in range(2)]}
        for i in range(2)
    ]
    tokens = tuple(PartRef(f"tokens/parts/{i}.parquet", 11, 44, 1, "0" * 64) for i in range(2))
    store.put_manifest(Manifest("tokens", "t", tokens, {"units": units}, {}))
    sources = {"web": {"pool_tokens": 88, "kept_tokens": 84, "pool_rows": 22}}
    totals = {"threshold": -20.0, "tally": {"sources": sources}}
    store.put_manifest(Manifest("selections", "s", tuple(parts), {"tokens": "t"}, {}, totals))
    replace(store.path("runs/r/result.json"), b'{"selection_fingerprint": "s"}')
    replace(store.path("runs/unfinished/spec.yaml"), b"")
    append(join(store.uri, "names", "mine"), {"selection": "s"})
    return store.path("selections", "s")
