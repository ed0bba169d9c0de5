"""Pools of workers: actors of one size that are kept from step to step, for any kind of task.

A pool starts to work with the first actor that the cluster has room for and grows to its width as
more nodes come; actors that still wait for a node are what an autoscaler sees. A lost actor is
replaced. What was lost with it is done again, within one budget for a task that kills its
workers, one for lost nodes, and one for a store that cannot be reached.
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
"""How often a task may find the store out of reach, for as long as `retries` try each time."""
_IN_A_ROW = 40
"""So many such tasks without a finished one between them: the store is gone for all."""
_NODE_DIED = "node has died"
"""What Ray says of an actor that was lost with its node, before it lists the node as dead."""
_CALLS = 2
"""Of one worker at a time: it reads for the second while it works on the first."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a worker's method; `name` is the task's, for errors."""

    name: str
    method: str
    arguments: tuple[Any, ...]


class TaskFailed(Exception):
    """A call ended with an error of its own; `error` is what to raise, `node` where it was."""

    def __init__(self, name: str, error: Exception, node: str | None) -> None:
        super().__init__(name)
        self.name, self.error, self.node = name, error, node


@dataclass(eq=False)
class _Worker:
    """An actor, and the calls that it has; `node` is known once it runs."""

    actor: Any
    starting: Any
    node: str | None = None
    calls: dict[Any, Call] = field(default_factory=dict[Any, Call])
    alone: bool = False
    """Whether its call may have killed a worker, and gets no other beside it."""


class Pool:
    """Actors with equal resources.

    Args:
        store: where tasks read and write.
        options: Ray's, of each actor.
        max_attempts: deaths of workers that one task may cause.
        note: told why calls wait.
    """

    def __init__(
        self,
        store: Store,
        options: Mapping[str, Any],
        max_attempts: int,
        note: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.options = options
        self._store, self._max_attempts, self._note = store, max_attempts, note
        self._workers: list[_Worker] = []
        self._never_ran = 0

    def run(
        self, calls: deque[Call], width: int, metrics: StepMetrics
    ) -> Generator[tuple[Call, Done]]:
        """Make all calls on up to `width` actors; yields each with its result as it comes.

        Calls may be added while it runs. Whoever stops asking has to `close` the pool: calls may
        be at work.

        Raises:
            TaskFailed: a call raised, kept killing its worker, or cannot reach the store.
            ClusterError: no worker can be started.
        """
        state = _OpenCalls(calls, self._max_attempts, metrics, self._note)
        width = min(width, len(calls))
        while state.unfinished:
            while len(self._workers) < width:
                self._workers.append(self._start())
            for worker, call in state.assign(self._workers[:width]):
                method = getattr(worker.actor, call.method)
                again = (state.begun[call.name] > 1,) if call.method == "do" else ()
                worker.calls[method.remote(*call.arguments, *again)] = call
            yield from self._collect(state)

    @property
    def at_work(self) -> bool:
        """Whether a worker has a call that nobody waits for any more, or `run` waits for."""
        return any(worker.calls for worker in self._workers)

    def close(self) -> None:
        """Terminate the actors: others need their place, or the job is done."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    def _start(self) -> _Worker:
        maker: Any = PoolWorker
        actor = maker.options(max_concurrency=_CALLS, **self.options).remote(self._store)
        return _Worker(actor, actor.node.remote())

    def _collect(self, state: "_OpenCalls") -> Iterator[tuple[Call, Done]]:
        """Wait for something to end, then take all that has."""
        owners = {ref: worker for worker in self._workers for ref in worker.calls}
        owners |= {worker.starting: worker for worker in self._workers if worker.starting}
        ray.wait(list(owners), num_returns=1)
        ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for reference in ready:
            worker = owners[reference]
            if worker not in self._workers:
                continue  # lost with another one of its calls
            try:
                found = ray.get(reference)
            except (RayActorError, OutOfMemoryError) as error:
                self._lost(worker, error, state)
            except RayTaskError as error:  # its arguments cannot be read there
                name = worker.calls[reference].name if reference in worker.calls else "worker"
                raise TaskFailed(name, _of_task(error), None) from None
            else:
                if reference == worker.starting:
                    worker.starting, worker.node = None, found
                    continue
                call = worker.calls.pop(reference)
                if state.take(call, found):
                    yield call, found

    def _lost(self, worker: _Worker, error: Exception, state: "_OpenCalls") -> None:
        """Replace an actor; what it had is done again, unless it could not even be started."""
        if isinstance(error, RayActorError) and error.actor_init_failed:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ClusterError(cannot_import(lines[-1])) from None
        ray.kill(worker.actor)  # it may only be out of reach
        self._workers.remove(worker)
        self._never_ran += worker.node is None
        if self._never_ran > PREEMPTION_BUDGET:
            raise ClusterError(f"workers die before they run: {str(error).splitlines()[0]}")
        node_lives = _NODE_DIED not in str(error) and worker.node in _alive_nodes()
        state.lose(list(worker.calls.values()), node_lives=node_lives)


class _OpenCalls:
    """The calls of one step that are not finished: what to do next, and what was lost how often."""

    def __init__(
        self,
        queue: deque[Call],
        max_attempts: int,
        metrics: StepMetrics,
        note: Callable[[str, dict[str, Any]], None],
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
        """Whether calls wait or are at work."""
        return bool(self._open or self._queue or self._suspects)

    def assign(self, workers: Sequence[_Worker]) -> Iterator[tuple[_Worker, Call]]:
        """Who makes which call now: first one each, then a second one to read ahead for.

        The last calls are not queued behind others: an idle worker may come for them.
        """
        running = [worker for worker in workers if worker.node is not None]
        for worker in running:
            if not worker.calls:
                worker.alone = bool(self._suspects)
                queue = self._suspects or self._queue
                if queue:
                    yield self._next(worker, queue)
        for worker in running:
            if len(worker.calls) == 1 and not worker.alone and len(self._queue) > len(running):
                yield self._next(worker, self._queue)
        self._metrics.in_flight(self._open)

    def _next(self, worker: _Worker, queue: deque[Call]) -> tuple[_Worker, Call]:
        call = queue.popleft()
        self.begun[call.name] += 1
        self._open += 1
        return worker, call

    def take(self, call: Call, done: Done) -> bool:
        """Whether a call is finished; else it is made again.

        Raises:
            TaskFailed: it never will be.
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
        final = self._in_a_row >= _IN_A_ROW or self._unreached[call.name] >= STORAGE_BUDGET
        if final or not failure.elsewhere:
            raise TaskFailed(call.name, as_error(failure.kind, failure.message), failure.node)
        self._metrics.retry("hardware")
        self._note("waiting", {"message": f"{failure.node}: {failure.message}"})
        self._queue.append(call)
        return False

    def lose(self, calls: list[Call], *, node_lives: bool) -> None:
        """Calls whose worker died are made again; alone, where it is not known which was at fault.

        Raises:
            TaskFailed: one that has cost too many workers.
        """
        self._open -= len(calls)
        for call in calls:
            self._metrics.retry("program" if node_lives else "hardware")
            if not node_lives:
                self._preempted[call.name] += 1
                if self._preempted[call.name] >= PREEMPTION_BUDGET:
                    self._give_up(call, f"lost its node {PREEMPTION_BUDGET} times")
                self._queue.appendleft(call)
                continue
            if len(calls) == 1:
                self._killed[call.name] += 1
                if self._killed[call.name] >= self._max_attempts:
                    self._give_up(call, f"killed its worker {self._killed[call.name]} times")
            self._suspects.append(call)

    def _give_up(self, call: Call, reason: str) -> None:
        raise TaskFailed(call.name, PartFailedError(f"part {call.name} {reason}"), None)


def as_error(name: str, message: str) -> Exception:
    """An error that was raised elsewhere: one of our own by its class's name."""
    kind = getattr(errors, name, None)
    return kind(message) if kind is not None else RuntimeError(message)


def _of_task(error: RayTaskError) -> Exception:
    """What to raise for an error of a call that Ray, not the worker, reports."""
    if isinstance(error.cause, ImportError):
        return ClusterError(cannot_import(str(error.cause)))
    return error


def _alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
