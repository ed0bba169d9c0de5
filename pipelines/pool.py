"""Pools of workers: equal actors that are kept from step to step, for any kind of task.

A pool starts to work with the first actor that the cluster has room for and grows to its width as
more nodes come; actors that wait for a node are what an autoscaler sees. A lost actor is replaced
and its calls are made again, within separate budgets for a task that kills its workers, for lost
nodes, and for a store that cannot be reached.
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from stillhouse import errors
from stillhouse.actors.metrics import StepMetrics
from stillhouse.actors.pool_worker import Done, FailedCall, PoolWorker, cannot_import
from stillhouse.errors import ClusterError, PartFailedError
from stillhouse.storage.artifact import Store

PREEMPTION_BUDGET = 100
"""Nodes that may be lost under one task."""
STORAGE_BUDGET = 5
"""Failures to reach the store that a task may have, each after all `retries`."""
_STORAGE_FAILURES_IN_A_ROW = 40
"""Of different tasks, with none finished in between: the store is gone for all."""
_NODE_DIED = "node has died"
"""What Ray says of an actor that was lost with its node, before it lists the node as dead."""
_CALLS = 2
"""Of one worker at a time: it reads for the second while it works on the first."""
Note = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a worker's method; `name` is the task's."""

    name: str
    method: str
    arguments: tuple[Any, ...]


class TaskFailed(Exception):
    """A call failed for good with `error`, on `node` where that is known."""

    def __init__(self, name: str, error: Exception, node: str | None) -> None:
        super().__init__(name)
        self.name, self.error, self.node = name, error, node


@dataclass(eq=False)
class _Worker:
    """An actor and its calls.

    Attributes:
        starting: the answer to its first call; None once it runs.
        node: that it runs on; None until then.
        alone: its call may have killed a worker, and gets no other one beside it.
    """

    actor: Any
    starting: Any
    node: str | None = None
    calls: dict[Any, Call] = field(default_factory=dict[Any, Call])
    alone: bool = False


class Pool:
    """Actors with equal resources.

    Args:
        options: Ray's options of each actor.
        max_attempts: deaths of workers that one task may cause.
        note: receives the reason where calls wait.
    """

    def __init__(
        self, store: Store, options: Mapping[str, Any], max_attempts: int, note: Note
    ) -> None:
        self.options = options
        self._store, self._max_attempts, self._note = store, max_attempts, note
        self._workers: list[_Worker] = []
        self._never_ran = 0

    def run(
        self, calls: deque[Call], width: int, metrics: StepMetrics
    ) -> Generator[tuple[Call, Done]]:
        """Make all calls on up to `width` actors; yields each with its result as it comes.

        Calls may be added while it runs. If the generator is not exhausted, `close` the pool.

        Raises:
            TaskFailed: a call raised, kept killing its worker, or cannot reach the store.
            ClusterError: no worker can be started.
        """
        state = _OpenCalls(calls, self._max_attempts, metrics, self._note)
        width = min(width, len(calls))
        while state.unfinished:
            while len(self._workers) < width:
                actor: Any = PoolWorker
                actor = actor.options(max_concurrency=_CALLS, **self.options).remote(self._store)
                self._workers.append(_Worker(actor, actor.node.remote()))
            for worker, call in state.assign(self._workers[:width]):
                method = getattr(worker.actor, call.method)
                again = (state.begun[call.name] > 1,) if call.method == "do" else ()
                worker.calls[method.remote(*call.arguments, *again)] = call
            yield from self._collect(state)

    @property
    def busy(self) -> bool:
        return any(worker.calls for worker in self._workers)

    def close(self) -> None:
        """Terminate the actors."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    def _collect(self, state: "_OpenCalls") -> Iterator[tuple[Call, Done]]:
        """Wait for a call to end, then take the results of all that have ended."""
        owners = {ref: worker for worker in self._workers for ref in worker.calls}
        owners |= {worker.starting: worker for worker in self._workers if worker.starting}
        ray.wait(list(owners), num_returns=1)
        ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for reference in ready:
            worker = owners[reference]
            if worker not in self._workers:
                continue  # lost with another one of its calls
            try:
                result = ray.get(reference)
            except (RayActorError, OutOfMemoryError) as error:
                self._lost(worker, error, state)
            except RayTaskError as error:  # the worker cannot unpickle the arguments
                name = worker.calls[reference].name if reference in worker.calls else "worker"
                cause: Exception = error
                if isinstance(error.cause, ImportError):
                    cause = ClusterError(cannot_import(str(error.cause)))
                raise TaskFailed(name, cause, None) from None
            else:
                if reference == worker.starting:
                    worker.starting, worker.node = None, result
                    continue
                call = worker.calls.pop(reference)
                if state.take(call, result):
                    yield call, result

    def _lost(self, worker: _Worker, error: Exception, state: "_OpenCalls") -> None:
        """Drop an actor and make its calls again, unless it could not even be started."""
        if isinstance(error, RayActorError) and error.actor_init_failed:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ClusterError(cannot_import(lines[-1])) from None
        ray.kill(worker.actor)  # it may only be out of reach
        self._workers.remove(worker)
        self._never_ran += worker.node is None
        if self._never_ran > PREEMPTION_BUDGET:
            raise ClusterError(f"workers die before they run: {str(error).splitlines()[0]}")
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        node_lives = _NODE_DIED not in str(error) and worker.node in alive
        state.lose(list(worker.calls.values()), node_lives=node_lives)


class _OpenCalls:
    """The unfinished calls of one step: which to make next, and how often each was lost."""

    def __init__(
        self, queue: deque[Call], max_attempts: int, metrics: StepMetrics, note: Note
    ) -> None:
        self._queue, self._max_attempts = queue, max_attempts
        self._metrics, self._note = metrics, note
        self._suspects: deque[Call] = deque()
        self._killed: Counter[str] = Counter()
        self._preempted: Counter[str] = Counter()
        self._unreached: Counter[str] = Counter()
        self._in_a_row = 0
        self._open = 0
        self.begun: Counter[str] = Counter()

    @property
    def unfinished(self) -> bool:
        return bool(self._open or self._queue or self._suspects)

    def assign(self, workers: Sequence[_Worker]) -> Iterator[tuple[_Worker, Call]]:
        """Calls to make now: first one for each worker, then a second one to read ahead for.

        The last calls are not queued behind others: another worker will be idle before.
        """
        running = [worker for worker in workers if worker.node is not None]
        for worker in running:
            if not worker.calls:
                worker.alone = bool(self._suspects)
                queue = self._suspects or self._queue
                if queue:
                    yield worker, self._next(queue)
        for worker in running:
            if len(worker.calls) == 1 and not worker.alone and len(self._queue) > len(running):
                yield worker, self._next(self._queue)
        self._metrics.in_flight(self._open)

    def _next(self, queue: deque[Call]) -> Call:
        call = queue.popleft()
        self.begun[call.name] += 1
        self._open += 1
        return call

    def take(self, call: Call, done: Done) -> bool:
        """Whether a call succeeded; if not, it is made again.

        Raises:
            TaskFailed: it failed for good.
        """
        self._open -= 1
        self._metrics.in_flight(self._open)
        if not isinstance(done.value, FailedCall):
            self._in_a_row = 0
            self._metrics.part(done.seconds, done.waited_s)
            return True
        failure = done.value
        self._in_a_row += 1
        self._unreached[call.name] += 1
        final = (
            self._in_a_row >= _STORAGE_FAILURES_IN_A_ROW
            or self._unreached[call.name] >= STORAGE_BUDGET
        )
        if final or not failure.retryable:
            raise TaskFailed(call.name, as_error(failure.kind, failure.message), failure.node)
        self._metrics.retry("hardware")
        self._note("waiting", {"message": f"{failure.node}: {failure.message}"})
        self._queue.append(call)
        return False

    def lose(self, calls: list[Call], *, node_lives: bool) -> None:
        """Make the calls of a dead worker again; alone, where either may have killed it.

        Raises:
            TaskFailed: one of them has cost too many workers.
        """
        self._open -= len(calls)
        for call in calls:
            self._metrics.retry("program" if node_lives else "hardware")
            if not node_lives:
                self._preempted[call.name] += 1
                if self._preempted[call.name] >= PREEMPTION_BUDGET:
                    raise _given_up(call, f"lost its node {PREEMPTION_BUDGET} times")
                self._queue.appendleft(call)
                continue
            if len(calls) == 1:
                self._killed[call.name] += 1
                if self._killed[call.name] >= self._max_attempts:
                    raise _given_up(call, f"killed its worker {self._killed[call.name]} times")
            self._suspects.append(call)


def _given_up(call: Call, reason: str) -> TaskFailed:
    return TaskFailed(call.name, PartFailedError(f"part {call.name} {reason}"), None)


def as_error(name: str, message: str) -> Exception:
    """An error of another process: the class of ours that has this name, or a RuntimeError."""
    kind = getattr(errors, name, None)
    return kind(message) if kind is not None else RuntimeError(message)
