"""Parts of tokens to train on, and a small trainer on them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.text.packing import tokens_schema
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.group import WorkerGroup
from stillhouse.training.loop import Trainer
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.stream import TokenStream

LENGTH, VOCAB = 6, 64
PART_ROWS = (30, 25, 41)
BATCH, LANES, STEPS = 12, 3, 50  # three lanes: one worker of two has two of them
_DOCUMENTS = tokens_schema(LENGTH, np.uint16).field("documents").type


def write_part(path, ids, sources):
    """Row r's first two tokens are of sources[r % 2], the rest of the other; None: of no source."""
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), LENGTH)
    table = pa.table({"input_ids": tokens})
    if sources is not None:
        documents = pa.array([_pieces(r, sources) for r in range(len(ids))], _DOCUMENTS)
        table = table.append_column("documents", documents)
    pq.write_table(table, path, row_group_size=9)


def _pieces(row, sources):
    ends = [(0, 2), (2, LENGTH)]
    return [
        {"id": "a", "source": sources[(row + i) % 2], "start": s, "end": e, "file": 0, "row": row}
        for i, (s, e) in enumerate(ends)
    ]


def write_parts(folder):
    """Three parts of sequences that count upwards, of the sources `sea`, `s0`, `s1` and `s2`."""
    uris = [str(folder / f"{i}.parquet") for i in range(len(PART_ROWS))]
    rng = np.random.default_rng(0)
    for i, (uri, rows) in enumerate(zip(uris, PART_ROWS, strict=True)):
        ids = (rng.integers(0, VOCAB, (rows, 1)) + np.arange(LENGTH)) % VOCAB
        write_part(uri, ids.astype(np.uint16), ["sea", f"s{i}"])
    return uris


def small_model(seed=0, length=12):
    settings = ModelSettings(hidden_size=32, num_layers=1)
    return build_model(settings, vocab_size=VOCAB, sequence_length=length, seed=seed, eos_id=0)


def make_trainer(
    uris,
    group=None,
    micro_batch=None,
    compile="off",
    batch=BATCH,
    lanes=LANES,
    model=None,
    **options,
):
    """A trainer of 50 steps on the parts of `write_parts`."""
    group = group or WorkerGroup()
    order = SampleOrder([Rows(PART_ROWS)], global_batch=batch, seed=0, lanes=lanes, window=10)
    fetch = read_ahead(PartReader(uris), 10)
    stream = TokenStream(order, fetch, rank=group.rank, num_workers=group.size)
    learning = Optimisation(
        learning_rate=3e-3, global_batch=batch, micro_batch=micro_batch, compile=compile
    )
    options |= {"device": torch.device("cpu"), "num_steps": STEPS, "group": group}
    return Trainer(model or small_model(), stream, learning, **options)


def same(one, other):
    """Whether two snapshots have the same bits."""
    tensors, others = one.tensors, other.tensors
    equal = tensors.keys() == others.keys() and one.progress == other.progress
    return equal and all(torch.equal(tensors[name], others[name]) for name in tensors)


def steps(run, count):
    """Losses and gradient norms of some steps."""
    return [(record.loss, record.grad_norm) for record in (run.step() for _ in range(count))]


def check_resumed(make):
    """A training that is resumed after three steps has the same bits after six."""
    whole = make()
    steps(whole, 3)
    state = whole.snapshot()
    steps(whole, 3)
    resumed = make()
    resumed.restore(state)
    steps(resumed, 3)
    assert same(resumed.snapshot(), whole.snapshot())
