"""Compare the objects of a store with their sha256, in threads or as Ray tasks."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from stillhouse.pipelines.ordered_tasks import map_in_tasks
from stillhouse.storage.integrity import Check, differing

_THREADS = 8
_BATCH = 64


def compare_here(checks: Sequence[Check]) -> list[str]:
    """The problems, a sentence each, in the order of `checks`."""
    with ThreadPoolExecutor(_THREADS) as threads:
        batches = threads.map(differing, _batches(checks, 8))
        return [problem for problems in batches for problem in problems]


def compare_in_tasks(checks: Sequence[Check]) -> list[str]:
    """As `compare_here`, on the cluster that this process is connected to."""
    found = map_in_tasks(differing, _batches(checks, _BATCH))
    return [problem for problems in found for problem in problems]


def _batches(checks: Sequence[Check], size: int) -> Iterator[Sequence[Check]]:
    starts: Iterable[int] = range(0, len(checks), size)
    return (checks[start : start + size] for start in starts)
