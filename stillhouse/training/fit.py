"""A training from its newest checkpoint to its end, with checkpoints on the way."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from stillhouse.training.checkpoint import Checkpoints, Loaded
from stillhouse.training.group import WorkerGroup
from stillhouse.training.state import Snapshot

RecordT = TypeVar("RecordT")
RecordT_co = TypeVar("RecordT_co", covariant=True)
OnStart = Callable[[int], None]
"""Is told the step that the training goes on from, before its first step."""


class Resumable(Protocol[RecordT_co]):
    """What `fit` takes to its end: a `Trainer`, or anything else that advances in steps."""

    def step(self) -> RecordT_co:
        """One step; what is told of it."""
        ...

    def snapshot(self) -> Snapshot:
        """The whole state between two steps; `progress["step"]` counts those that are done."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there."""
        ...


class Stateful(Protocol):
    """Something that advances with a training and is kept in its checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Its state as JSON values, which it does not touch any more."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


def fit(
    trainer: Resumable[RecordT],
    checkpoints: Checkpoints,
    group: WorkerGroup,
    *,
    num_steps: int,
    checkpoint_every: int,
    on_step: Callable[[RecordT], float | None],
    on_start: OnStart | None = None,
    beside: Mapping[str, Stateful] | None = None,
    until: int | None = None,
    stopped: Callable[[], bool] | None = None,
) -> int:
    """Train up to `num_steps`; all workers call this, the first one writes the checkpoints.

    A worker that dies, or an error, leaves what was committed; calling this again goes on from
    there, with any number of workers.

    Args:
        trainer: fresh; its state is replaced where there is a checkpoint.
        checkpoints: of this training.
        group: the trainer's.
        num_steps: of the whole training.
        checkpoint_every: steps; the last step is always kept.
        on_step: called on every worker after every step; gives the held-out loss, if measured.
        on_start: called on every worker too.
        beside: by name, what else is part of the training's state; the first worker's is kept.
        until: as `load_together`.
        stopped: asked before every step; the same on all workers. The training ends where it says
            so, which has to be at a checkpoint.

    Returns:
        The step of the checkpoint that it went on from, or 0.

    Raises:
        ArtifactError: the checkpoint is of another training. DivergedError: as `trainer.step`.
        StorageError: a checkpoint could not be written.
    """
    loaded = load_together(checkpoints, group, until=until)
    start = 0
    if loaded is not None:
        start = loaded.step
        trainer.restore(loaded.snapshot)
        for name, part in (beside or {}).items():
            part.load_state_dict(loaded.snapshot.progress["beside"][name])
    if on_start is not None:
        on_start(start)
    with checkpoints:
        for step in range(start + 1, num_steps + 1):
            if stopped is not None and stopped():
                break
            score = on_step(trainer.step())
            if step % checkpoint_every == 0 or step == num_steps:
                snapshot = trainer.snapshot()
                if group.rank == 0:
                    states = {name: part.state_dict() for name, part in (beside or {}).items()}
                    snapshot.progress["beside"] = states
                    checkpoints.save(snapshot, score)
    return start


def load_together(
    checkpoints: Checkpoints, group: WorkerGroup, *, until: int | None = None
) -> Loaded | None:
    """The newest whole checkpoint as the first worker finds it; the same one on all workers.

    Args:
        checkpoints: of the training.
        group: its workers.
        until: as `Checkpoints.load_newest`, where the first worker knows it.
    """
    newest = checkpoints.load_newest(until) if group.rank == 0 else None
    step = group.gather(None if newest is None else newest.step)[0]
    return newest if group.rank == 0 or step is None else checkpoints.load(step)
