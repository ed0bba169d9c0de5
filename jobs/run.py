"""`stillhouse run`: one job from its spec to its result; nothing where the result exists."""

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from stillhouse.classification.spec import ClassifySpec
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import LostClusterError, StoppedEarlyError, StorageError, require
from stillhouse.fingerprint import fingerprint
from stillhouse.generation.spec import GenerateSpec
from stillhouse.jobs import process
from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.kinds import Job, Spec, result_artifact
from stillhouse.jobs.paths import identity_of
from stillhouse.jobs.progress import Recorder
from stillhouse.jobs.publish import check_name, publish_result
from stillhouse.jobs.track import Tracked
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import Context, FailedAt, Listener
from stillhouse.pipelines.ordered_tasks import map_in_tasks
from stillhouse.spec import EvaluatedSpec, JobSpec, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import remember_options, use_options
from stillhouse.storage.run_record import RunRecord, now, read_json
from stillhouse.training.task import RECIPE_VERSION

RUN_VERSION = 2
_STOPS = (KeyboardInterrupt, SystemExit, LostClusterError, StoppedEarlyError)
SUBMISSION_VARIABLE = "STILLHOUSE_SUBMISSION"
"""The id of the submitted job, in its driver's environment; see `stillhouse.jobs.submit`."""


def list_job(spec: Spec) -> Job:
    """Check what a spec names and list its inputs; imports only what its kind of job needs.

    Raises:
        StillhouseError: something does not exist, or does not fit.
    """
    job = _list_job(spec)
    if isinstance(spec, EvaluatedSpec) and spec.evaluate is not None:
        from stillhouse.jobs.evaluated import EvaluatedJob

        return EvaluatedJob(job, spec.evaluate)
    return job


def _list_job(spec: Spec) -> Job:
    if isinstance(spec, DistillSpec):
        from stillhouse.jobs.distill import DistillationJob

        return DistillationJob(spec)
    if isinstance(spec, MixSpec):
        from stillhouse.jobs.mix import MixJob

        return MixJob(spec)
    if isinstance(spec, SelectSpec):
        from stillhouse.jobs.select import SelectJob

        return SelectJob(spec)
    if isinstance(spec, ClassifySpec):
        from stillhouse.jobs.classify import ClassifyJob

        return ClassifyJob(spec)
    if isinstance(spec, GenerateSpec):
        from stillhouse.jobs.generate import GenerateJob

        return GenerateJob(spec)
    from stillhouse.jobs.train import TrainJob

    return TrainJob(spec)


def run_job(spec: Spec, shown: Listener) -> dict[str, Any]:
    """Run a job, or find that there is nothing to do; the object that `run --json` prints.

    Raises:
        MissingExtraError: Ray or the libraries of models are not installed.
        StillhouseError: whatever stopped it; finished parts stay, run again to go on.
    """
    run = JobRun(spec)
    return run.finished() or run.start(shown)


class JobRun:
    """A job whose inputs are known by content; nothing has run yet.

    Attributes:
        name: the fingerprint of its run.

    Raises:
        MissingExtraError, StillhouseError: as `run_job`.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._worker_env = worker_environment(spec)
        self._began = now()
        job = list_job(spec)
        self._store = Store(check_store(spec.store))
        self._store.map_large = partial(_map_on_cluster, spec, self._worker_env)
        check_name(self._store, spec)
        self._job = job.open(self._store, remember=True)
        self.name = run_name(spec, job.identity())

    def finished(self) -> dict[str, Any] | None:
        """The result of an earlier run, published if the spec says so; None if there is none."""
        found = finished_result(self._store, self.name)
        if found is None:
            return None
        reused = {step: w | {"reused": w["parts"]} for step, w in found["work"].items()}
        published = publish_result(self._store, self.spec, found, self._began)
        return found | {"status": "nothing_to_do", "work": reused} | published

    def start(self, shown: Listener) -> dict[str, Any]:
        """Run it to its end; the object that `run --json` prints."""
        spec, store = self.spec, self._store
        record = RunRecord(store, self.name)
        record.start(spec.to_yaml(), spec.job, os.environ.get(SUBMISSION_VARIABLE), spec.name)
        tracked = Tracked(Recorder(shown, record), spec, spec.job, self.name)
        ctx = Context(store, spec.compute, tracked, run=self.name)
        where = recorded(record, spec, lambda: ctx.failed_at or FailedAt())
        with where, connected(spec, self._worker_env, record):
            from stillhouse.pipelines.placement import check_placement

            check_placement(
                spec.compute, lambda text: ctx.listener.note("waiting", {"message": text})
            )
            try:
                result = self._job.run(ctx, record.uri)
            except BaseException:
                tracked.finish(None)
                raise
            finally:
                ctx.close_pool()
                ctx.metrics("").forget()
            tracked.finish(result)
        record.put_result(result)
        record.finish("done")
        return result | publish_result(store, spec, result, self._began)


def worker_environment(spec: JobSpec) -> dict[str, str]:
    """Use and remember a job's options of storage; the environment variables of its workers.

    Raises:
        MissingExtraError: Ray or the libraries of models are not installed.
    """
    trackers = spec.track.modules if spec.track is not None else ()
    require("ray", "torch", "transformers", *spec.extra_modules, *trackers)
    environment = use_options(spec.store, spec.storage_options)
    remember_options(spec.store, spec.storage_options)
    return environment


@contextmanager
def recorded(
    record: RunRecord, spec: JobSpec, failed_at: Callable[[], FailedAt]
) -> Generator[None]:
    """Tell the parent process of a run that has started; an error inside ends its record."""
    process.tell_parent(run=record.uri, store=spec.store, options=spec.storage_options)
    try:
        yield
    except BaseException as error:
        with suppress(StorageError):  # the store may be what failed
            state = "stopped" if isinstance(error, _STOPS) else "failed"
            record.finish(state, process.failure_text(error), asdict(failed_at()))
        raise


def connected(
    spec: JobSpec, worker_env: dict[str, str], record: RunRecord
) -> AbstractContextManager[None]:
    """A Ray session with room for a job; if it is lost, the record says so."""
    lost = partial(_end, record) if process.is_supervised() else None
    return cluster(spec.compute, worker_env, spec.num_actors, lost)


def _map_on_cluster(
    spec: JobSpec,
    worker_env: dict[str, str],
    function: Callable[[Any], Any],
    items: Iterable[Any],
) -> list[Any]:
    """`map`, each item in a Ray task, in a session of its own where there is none."""
    with cluster(spec.compute, worker_env, spec.num_actors):
        return list(map_in_tasks(function, items))


def _end(record: RunRecord, why: str) -> None:
    """End this process: its main thread may wait forever for a cluster that is gone."""
    error = LostClusterError(f"{why}: run the same command again once it is up")
    with suppress(StorageError):
        record.finish("stopped", str(error))
    process.end(error.exit_code, str(error))


def run_name(spec: Spec, inputs: list[Any]) -> str:
    """The fingerprint of a run: its spec without paths and widths, and the content it reads."""
    return fingerprint(["run", RUN_VERSION, RECIPE_VERSION, identity_of(spec), *inputs])


def finished_result(store: Store, name: str) -> dict[str, Any] | None:
    """The result of a finished run whose artifact still exists, or None."""
    result = read_json(store.path("runs", name), "result.json")
    if result is None:
        return None
    kind, made = result_artifact(result)
    return result if store.find_manifest(kind, made) is not None else None
