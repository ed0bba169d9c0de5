"""Workers that a distil job keeps from step to step: what they loaded serves the next one too."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError

from stillhouse.actors.image_worker import ImageCall, ImageHost, ImageWork
from stillhouse.actors.part_worker import CrewWorker
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.flow import Made, Stream, attempts_of, finish_parts, not_begun
from stillhouse.pipelines.placement import actor_options
from stillhouse.storage.artifact import Receipt


class Crew:
    """Actors that are made with the first step that needs them, and again where one was lost.

    Small steps follow one another here: a pool for each would load PyTorch and the images anew.
    """

    def __init__(self, ctx: Context, work: ImageWork) -> None:
        self._ctx, self._work = ctx, work
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}
        """Of these, the ones that wait for a node or load, by what they will answer."""

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()

    def do(
        self, step: str, kind: str, calls: Sequence[ImageCall], *, workers: int = 1
    ) -> list[Receipt]:
        """Do every task whose receipt is not in the store yet; the receipts of all, in order.

        Args:
            step: its name in progress, events and accounts.
            kind: where the receipts lie.
            calls: the tasks.
            workers: how many do them; the result does not depend on it.

        Raises:
            PartFailedError: a task kept killing its worker. ClusterError: workers lack code. Any
            StillhouseError of a task.
        """
        stream: Stream = partial(self._stream, step, kind, workers)
        return finish_parts(self._ctx, step, kind, calls, stream, unit="images")

    def dismiss(self) -> None:
        """End the workers: what they hold is needed elsewhere, or the job is done."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._starting = [], {}

    def _stream(self, step: str, kind: str, workers: int, calls: list[ImageCall]) -> Iterator[Made]:
        ctx, metrics = self._ctx, self._ctx.metrics(step)
        attempts = attempts_of(ctx)
        left = deque(calls)
        while len(self._actors) < min(workers, len(calls)):
            self._make()
        starting = list(self._starting.values())
        idle = [actor for actor in self._actors if actor not in starting]
        busy: dict[Any, tuple[Any, ImageCall]] = {}
        while left or busy:
            while left and idle and len(busy) < workers:
                actor, call = idle.pop(), left.popleft()
                busy[actor.run.remote(call, kind, metrics, attempts)] = actor, call
            (ready,), _ = ray.wait([*busy, *self._starting], num_returns=1)
            actor, call = busy.pop(ready, (None, None))
            try:
                done = ray.get(ready)
            except RayActorError as error:
                self._replace(actor or self._starting.pop(ready), error)
                if call is not None:
                    left.appendleft(call)  # `Attempts` counts it, and gives it up in the end
                continue
            idle.append(actor or self._starting.pop(ready))
            if call is not None:
                yield done

    def _replace(self, lost: Any, error: RayActorError) -> None:
        """Another worker for one that was lost, unless none could even begin."""
        if error.actor_init_failed:
            raise not_begun(error) from None
        ray.kill(lost)  # it may only be out of reach
        self._actors.remove(lost)
        self._make()

    def _make(self) -> None:
        """Another worker. It gets work once it answers: there may be no room for all of them."""
        ctx = self._ctx
        maker: Any = CrewWorker
        options = actor_options(ctx.compute, ctx.compute.trainer)
        make = partial(ImageHost, ctx.store, self._work)
        actor = maker.options(**options).remote(make, ctx.store)
        self._actors.append(actor)
        self._starting[actor.ready.remote()] = actor
