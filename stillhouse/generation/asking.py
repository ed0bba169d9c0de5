"""Asking models: calls, programs that make them, and the cache in which every answer is kept.

A program writes one item. It is a Python generator that yields lists of calls and is sent their
answers, and returns the item. Many programs run side by side: calls of models in this process wait
until all programs wait, and are then answered in batches; calls of endpoints are on their way at
once, each in a thread. An answer is an object `answers/<xx>/<name>.json` of the store, named by its
model and all that was asked, and is never asked for again.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeAlias

from stillhouse.fingerprint import canonical_json, fingerprint
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import read_bytes

ANSWERS = "answers"
_CALL_VERSION = 1
_THREADS = 16
_TOKENS = ("prompt_tokens", "completion_tokens")
_PATIENCE_S = 30
"""For calls on their way when another one ends the run."""
Role: TypeAlias = str
"""Of a model: `strong`, `student` or `judge`."""
Item: TypeAlias = dict[str, Any]
"""What a program writes or works on; JSON values."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A call of a model.

    Attributes:
        role: which of the job's models.
        prompt: what a user says to it.
        given: an answer whose mean log-likelihood a token is asked for; None to write one.
        temperature: 0 takes the likeliest token always.
        max_tokens: of the answer.
        seed: of the draws.
    """

    role: Role
    prompt: str
    given: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        text: without white space at its ends.
        finished: whether it ended by itself, not at `max_tokens`.
        score: mean log-likelihood a token, in nats, of the answer given.
        prompt_tokens, completion_tokens: read and written.
        fault: why there is no answer, such as a prompt longer than the context.
    """

    text: str = ""
    finished: bool = True
    score: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fault: str = ""


Program: TypeAlias = Generator[list[Ask], list[Answer], Item]


class Backend(Protocol):
    """A model that answers.

    Attributes:
        identity: JSON values; answers of two models of one identity are interchangeable.
        in_flight: calls at once, each in a thread; None for batches in this process.
    """

    @property
    def identity(self) -> list[Any]: ...
    @property
    def in_flight(self) -> int | None: ...

    def answer(self, asks: Sequence[Ask]) -> list[Answer]: ...


class Spending(Protocol):
    """Counts calls before they are made, and tokens after.

    Raises:
        SpentError: by `take`, where the budget is spent.
    """

    def take(self, role: Role, calls: int) -> None: ...
    def used(self, role: Role, prompt_tokens: int, completion_tokens: int) -> None: ...


def call_name(identity: Sequence[Any], ask: Ask) -> str:
    """The name of an answer: the fingerprint of the model and of all that is asked."""
    content = asdict(ask)
    del content["role"]
    return fingerprint(["call", _CALL_VERSION, list(identity), content])


@dataclass
class Asker:
    """Runs programs.

    Attributes:
        counts: `calls` that were made, and `cached_calls` that were found answered.
    """

    store: Store
    backends: Mapping[Role, Backend]
    spending: Spending
    counts: Counter[str] = field(default_factory=Counter[str])

    def run(self, programs: Iterable[Program]) -> list[Item]:
        """The items of all programs, in order.

        Raises:
            SpentError: the budget is spent; what was answered stays.
            Any error of a model.
        """
        backends = {id(one): one for one in self.backends.values()}.values()
        threads = ThreadPoolExecutor(max(1, sum(one.in_flight or 0 for one in backends)))
        running = _Running([*programs], self, threads)
        try:
            return running.to_the_end()
        except BaseException:
            running.keep_what_comes(_PATIENCE_S)
            raise
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def stored(self, names: Sequence[str]) -> dict[str, Answer]:
        """The answers that the store has, by name."""
        if not names:
            return {}
        with ThreadPoolExecutor(_THREADS) as threads:
            found = threads.map(self._stored, names)
            return {name: one for name, one in zip(names, found, strict=True) if one is not None}

    def _stored(self, name: str) -> Answer | None:
        try:
            return _parsed(read_bytes(self._uri(name)))
        except FileNotFoundError:
            return None

    def _keep(self, name: str, answer: Answer) -> Answer:
        """Keep an answer; one without content is asked for again by the next run."""
        if answer.fault or (not answer.text and answer.score is None):
            return answer
        return _parsed(create_or_adopt(self._uri(name), canonical_json(asdict(answer))))

    def _uri(self, name: str) -> str:
        return self.store.path(ANSWERS, name[:2], f"{name}.json")

    def make(self, calls: Sequence[tuple[str, Ask]]) -> list[Answer]:
        """Ask one model and keep the answers; the first one that was ever kept is the answer."""
        role = calls[0][1].role
        self.spending.take(role, len(calls))
        made = self.backends[role].answer([ask for _, ask in calls])
        read, written = (sum(getattr(one, key) for one in made) for key in _TOKENS)
        self.spending.used(role, read, written)
        names = [name for name, _ in calls]
        with ThreadPoolExecutor(min(_THREADS, len(calls))) as threads:
            return [*threads.map(self._keep, names, made)]


def _parsed(data: bytes) -> Answer:
    return Answer(**json.loads(data))


class _Running:
    """Programs and their calls, which are known by name: equal ones are made once."""

    def __init__(self, programs: list[Program], asker: Asker, threads: ThreadPoolExecutor) -> None:
        self._programs, self._asker, self._threads = programs, asker, threads
        self._items: dict[int, Item] = {}
        self._wanted: dict[int, list[str]] = {}
        self._answers: dict[str, Answer] = {}
        self._batches: defaultdict[Role, list[tuple[str, Ask]]] = defaultdict(list)
        self._flying: dict[Future[list[Answer]], str] = {}

    def to_the_end(self) -> list[Item]:
        ready = [*range(len(self._programs))]
        while ready:
            asked: dict[str, Ask] = {}
            for i in ready:
                asked |= self._step(i)
            self._send(asked)
            ready = self._ready()
            while not ready and (self._flying or self._batches):
                self._answers |= self._next_answers()
                ready = self._ready()
        return [self._items[i] for i in range(len(self._programs))]

    def _step(self, i: int) -> dict[str, Ask]:
        """Run a program to its next calls, which are returned by name, or to its end."""
        names, program = self._wanted.pop(i, None), self._programs[i]
        try:
            if names is None:
                asks = next(program)
            else:
                asks = program.send([self._answers[name] for name in names])
        except StopIteration as end:
            self._items[i] = end.value
            return {}
        backends = self._asker.backends
        named = [(call_name(backends[ask.role].identity, ask), ask) for ask in asks]
        self._wanted[i] = [name for name, _ in named]
        return dict(named)

    def _ready(self) -> list[int]:
        """The programs whose calls are all answered."""
        return [i for i, names in self._wanted.items() if self._answers.keys() >= {*names}]

    def _send(self, asked: Mapping[str, Ask]) -> None:
        """Look the answers up, and ask for the others, unless that was done."""
        open_calls = {*self._flying.values()}
        open_calls |= {name for calls in self._batches.values() for name, _ in calls}
        new = [n for n in asked if n not in self._answers and n not in open_calls]
        known = self._asker.stored(new)
        self._asker.counts["cached_calls"] += len(known)
        self._answers |= known
        for call in ((name, asked[name]) for name in new if name not in known):
            role = call[1].role
            if self._asker.backends[role].in_flight is None:
                self._batches[role].append(call)
            else:
                self._flying[self._threads.submit(self._asker.make, [call])] = call[0]
                self._asker.counts["calls"] += 1

    def _next_answers(self) -> dict[str, Answer]:
        """The answers of endpoints that have come; else of a whole batch; else wait for some."""
        done, _ = wait(self._flying, 0 if self._batches else None, FIRST_COMPLETED)
        if done:
            return {self._flying.pop(one): one.result()[0] for one in done}
        calls = self._batches.pop(next(iter(self._batches)))
        self._asker.counts["calls"] += len(calls)
        return dict(zip((name for name, _ in calls), self._asker.make(calls), strict=True))

    def keep_what_comes(self, seconds: float) -> None:
        """Wait for calls that are on their way: their answers are kept by their threads."""
        for one in self._flying:
            one.cancel()
        wait([one for one in self._flying if not one.cancelled()], seconds)
