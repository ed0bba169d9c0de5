"""The kinds of jobs: all that the verbs have to know of each, in one place.

A new kind is a spec (a `JobSpec` in `Spec` and `SPECS`), a module such as `jobs/select.py` with
its `Listed` and `Opened`, a line in `list_job` and in `RESULTS`, and a function that builds its
`Result` (`pipelines/*_result.py`).
"""

from typing import Any, Protocol, TypeAlias

from stillhouse.distillation.spec import DistillSpec
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import Context
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo
from stillhouse.storage.run_record import RunRecord
from stillhouse.training.spec import TrainSpec

Spec: TypeAlias = SelectSpec | TrainSpec | MixSpec | DistillSpec
"""Any job's spec; `job` says which."""
SPECS: dict[str, type[Spec]] = {
    "select": SelectSpec,
    "train": TrainSpec,
    "mix": MixSpec,
    "distill": DistillSpec,
}
RESULTS = {
    "select": ("selections", "selection_fingerprint"),
    "train": ("models", "model_fingerprint"),
    "mix": ("models", "model_fingerprint"),
    "distill": ("distilled", "distilled_fingerprint"),
}
"""By job: the kind of artifact that it is run for, and the key of a result that names it."""


class Listed(Protocol):
    """A job whose spec was checked and whose inputs were listed; the store was not touched."""

    @property
    def files(self) -> list[list[FileInfo]]:
        """What it reads, by data source."""
        ...

    def open(self, store: Store, *, remember: bool) -> "Opened":
        """Look at the content of its inputs; `remember` writes their digests to the store."""
        ...


class Opened(Protocol):
    """A job whose inputs are known by content."""

    def identity(self) -> list[Any]:
        """What it reads, as JSON values: content, not paths."""
        ...

    def walk(self, ctx: Context) -> object:
        """Go through the pipeline without a result: what `plan` does, with a dry context."""
        ...

    def run(self, ctx: Context, record: RunRecord) -> dict[str, Any]:
        """Do it, write the report; the result, which `run --json` prints."""
        ...

    def estimate(self, ctx: Context, *, complete: bool) -> dict[str, dict[str, Any]]:
        """By step: `parts` (None: not known yet), `reused`, `tokens`, `flops`, `seconds` or None.

        Args:
            ctx: a dry one that was walked as far as it goes.
            complete: it went to the end.
        """
        ...


def list_job(spec: Spec) -> Listed:
    """Check what a spec names and list what it reads.

    Raises:
        StillhouseError: something is not there, or does not fit.
    """
    if isinstance(spec, DistillSpec):  # a job's own module alone: the others are heavy
        from stillhouse.jobs.distill import list_distill

        return list_distill(spec)
    if isinstance(spec, MixSpec):
        from stillhouse.jobs.mix import list_mix

        return list_mix(spec)
    if isinstance(spec, SelectSpec):
        from stillhouse.jobs.select import list_select

        return list_select(spec)
    from stillhouse.jobs.train import list_train

    return list_train(spec)


def result_artifact(result: dict[str, Any]) -> tuple[str, str]:
    """Kind and fingerprint of the artifact that a finished run was run for."""
    kind, key = RESULTS[result["job"]]
    return kind, result[key]
