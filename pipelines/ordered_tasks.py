"""A function over many items in Ray tasks, without a step's receipts and retry budgets."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_IN_FLIGHT = 256


def map_in_tasks(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, a task of one CPU for each item, on the cluster that this process is connected to.

    Results come in the order of the items; a task whose node is lost is repeated.
    """
    import ray

    remote, given = ray.remote(num_cpus=1)(_call), ray.put(function)
    waiting: deque[ray.ObjectRef[R]] = deque()
    for item in items:
        if len(waiting) >= _IN_FLIGHT:
            yield ray.get(waiting.popleft())
        waiting.append(remote.remote(given, item))
    while waiting:
        yield ray.get(waiting.popleft())


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
