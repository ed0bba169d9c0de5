"""Workers that a distil job keeps from step to step: what they loaded serves the next one too."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray

from actors.image_worker import ImageCall, ImageHost, ImageWork
from actors.part_worker import CrewWorker
from pipelines.context import Context
from pipelines.flow import Stream, attempts_of, finish_parts, made_by
from pipelines.placement import actor_options
from stillhouse.storage.artifact import Receipt


class Crew:
    """Actors that are made with the first step that needs them; a lost one is made again by Ray.

    Small steps follow one another here: a pool for each would load PyTorch and the images anew.
    """

    def __init__(self, ctx: Context, work: ImageWork) -> None:
        self._ctx, self._work = ctx, work
        self._actors: list[Any] = []

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
            PartFailedError: a task kept killing its worker. Any StillhouseError of a task.
        """
        stream: Stream = partial(self._stream, step, kind, workers)
        return finish_parts(self._ctx, step, kind, calls, stream, unit="images")

    def dismiss(self) -> None:
        """End the workers: what they hold is needed elsewhere, or the job is done."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _stream(
        self, step: str, kind: str, workers: int, calls: list[ImageCall]
    ) -> Iterator[tuple[Receipt, float]]:
        ctx, metrics = self._ctx, self._ctx.metrics(step)
        attempts = attempts_of(ctx)
        idle, left = self._called(min(workers, len(calls))), deque(calls)
        busy: dict[Any, Any] = {}
        while left or busy:
            while left and idle:
                actor = idle.pop()
                busy[actor.run.remote(left.popleft(), kind, metrics, attempts)] = actor
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            idle.append(busy.pop(ready))
            yield made_by(ctx, step, *ray.get(ready))

    def _called(self, count: int) -> list[Any]:
        """So many of the workers, the missing ones made."""
        ctx = self._ctx
        maker: Any = CrewWorker
        options = actor_options(ctx.compute, ctx.compute.trainer)
        make = partial(ImageHost, ctx.store, self._work)
        while len(self._actors) < count:
            self._actors.append(maker.options(**options).remote(make, ctx.store))
        return self._actors[:count]
