"""Prefetching a training worker's windows with Ray Data, inside that worker.

A dataset of window descriptors is mapped by one reader actor; `preserve_order` and a bound on the
object store keep it in order and not too far ahead. The dataset is built in the worker, so that it
does not depend on the number of workers. Ray Data takes seconds to start: until then a thread reads
the first windows.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stillhouse.actors.windows import WindowReader
from stillhouse.pipelines.pool import as_error
from stillhouse.training.fetch import Fetch, PartReader, read_ahead
from stillhouse.training.order import Window

_DESCRIPTORS = 512
"""Windows of one execution: the list is short, however long the training."""
_AHEAD_BYTES = 256 << 20
"""Of the object store, for each worker."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The actors that Ray Data maps windows to tables with.

    Attributes:
        actor, arguments: the class, and what it is made with.
        workers: actors of this training worker.
        options: resources and placement; None: no resources, on the worker's node.
    """

    actor: type
    arguments: tuple[Any, ...]
    workers: int = 1
    options: Mapping[str, Any] | None = None


def stream_windows(reader: PartReader, *, direct: int, stage: Stage | None = None) -> Fetch:
    """A `Fetch` in which Ray Data reads all windows but the first `direct` ones.

    `direct` is the number that a worker needs to start: one for each lane and data set. `stage`
    reads the others; default a reader on the worker's node.
    """
    actors = stage or Stage(WindowReader, (reader,))

    def fetch(windows: Iterator[Window]) -> Iterator[pa.Table]:
        head = list(islice(windows, direct))
        first = next(windows, None)
        tail = iter(()) if first is None else _one_ahead(_streamed(actors, chain([first], windows)))
        yield from read_ahead(reader, 1)(iter(head))
        yield from tail

    return fetch


def _one_ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, the next one always requested by a thread, starting now."""
    thread = ThreadPoolExecutor(1, "ray-data")
    waiting: Future[pa.Table | None] = thread.submit(next, tables, None)

    def give() -> Iterator[pa.Table]:
        nonlocal waiting
        try:
            while (table := waiting.result()) is not None:
                waiting = thread.submit(next, tables, None)
                yield table
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    return give()


def _streamed(stage: Stage, windows: Iterator[Window]) -> Iterator[pa.Table]:
    while batch := list(islice(windows, _DESCRIPTORS)):
        yield from _whole(batch, _blocks(stage, batch))


def _blocks(stage: Stage, windows: list[Window]) -> Iterator[pa.Table]:
    """The rows of some windows in order, in blocks of Ray Data's choice."""
    for name in [n for n in logging.root.manager.loggerDict if n.startswith("ray.data")]:
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_AHEAD_BYTES)
    rows: list[dict[str, Any]] = [{"window": window} for window in windows]
    options = stage.options
    if options is None:
        node = ray.get_runtime_context().get_node_id()
        strategy = NodeAffinitySchedulingStrategy(node, soft=True)
        options = {"num_cpus": 0, "scheduling_strategy": strategy}
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        stage.actor,
        fn_constructor_args=stage.arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=stage.workers),
        **options,
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def _whole(windows: list[Window], blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows of blocks as one table for each window."""
    held: list[pa.Table] = []
    num_rows = 0
    for window in windows:
        while num_rows < window.num_rows:
            block = _checked(next(blocks))
            held.append(block)
            num_rows += block.num_rows
        table = held[0] if len(held) == 1 else pa.concat_tables(held)
        yield table.slice(0, window.num_rows)
        held = [table.slice(window.num_rows)] if num_rows > window.num_rows else []
        num_rows -= window.num_rows


def _checked(block: pa.Table) -> pa.Table:
    """The block without columns of errors, which Ray Data adds when it joins it to such a block.

    Raises:
        StillhouseError: an error of the reader.
    """
    if "error" not in block.column_names:
        return block
    for name, message in zip(*(block[n].to_pylist() for n in ("error", "message")), strict=True):
        if name is not None:
            raise as_error(name, message)
    return block.drop_columns(["error", "message"])
