"""How long a training can be before its data sets are exhausted (`max_epochs`)."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stillhouse.errors import SpecError
from stillhouse.training.task import TrainTask


def within_limits(task: TrainTask, keys: Sequence[str], *, asked: bool) -> TrainTask:
    """The training, if its data sets last until its end.

    Args:
        keys: of the data sets in the spec.
        asked: whether the spec says how long it is. If it does not, the training ends a few steps
            earlier where the lanes do not divide the rows of a data set.

    Raises:
        SpecError: they do not last; says how many tokens there are.
    """
    short = _exhausted(task)
    if short is None:
        return task
    lengths = range(1, task.num_steps)
    steps = bisect_left(
        lengths, True, key=lambda n: _exhausted(replace(task, num_steps=n)) is not None
    )
    order = task.order()
    rounding = 1 - (-order.num_datasets // order.rows_per_lane)
    if steps and not asked and task.num_steps - steps <= rounding:
        return replace(task, num_steps=steps)
    whole, fits = task.num_steps * task.step_units, steps * task.step_units
    fewer = f"`train.num_tokens` has to be {fits} or less" if fits else "there is no such training"
    if short.dataset is None:
        raise SpecError(
            f"`max_epochs`: of {whole} tokens all data sets that have a weight are exhausted after "
            f"{short.num_steps * task.step_units}: {fewer}, or raise one"
        )
    data, key = task.data[short.dataset], keys[short.dataset]
    other = f", or lower its weight, or set `{key}.when_exhausted: reweight`"
    raise SpecError(
        f"`{key}.max_epochs: {data.share.max_epochs:g}`: {whole} tokens of training see "
        f"{data.name!r} {short.epochs:.3g} times, which has {data.num_tokens} tokens: {fewer}, or "
        f"raise `max_epochs`{other if len(task.data) > 1 else ''}"
    )


@dataclass(frozen=True, slots=True)
class _Exhausted:
    """A data set that does not last.

    Attributes:
        dataset: None: all that have a weight, after `num_steps`.
        epochs: of the data set, that the training needs.
    """

    dataset: int | None = None
    num_steps: int = 0
    epochs: float = 0.0


def _exhausted(task: TrainTask) -> _Exhausted | None:
    """What a training of the task's steps lacks, if anything."""
    if all(one.share.max_epochs is None for one in task.data):
        return None
    order, steps = task.order(), task.num_steps
    ends = order.mixture.num_draws
    if ends is not None and ends < steps * order.rows_per_lane:
        return _Exhausted(num_steps=ends // order.rows_per_lane)
    for i, one in enumerate(task.data):
        limit = None if one.share.reweight else order.limit(i, one.share.max_epochs)
        drawn = [] if limit is None else order.num_drawn(i, steps)
        if limit is not None and max(drawn) > limit:
            return _Exhausted(i, epochs=sum(drawn) / one.num_rows)
    return None
