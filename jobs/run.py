"""`stillhouse run`: one job from its spec to its result; nothing where the result exists."""

import os
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from stillhouse.classification.spec import ClassifySpec
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import LostClusterError, StorageError, require
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs import process
from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.kinds import Job, Spec, result_artifact
from stillhouse.jobs.paths import identity_of
from stillhouse.jobs.progress import Recorder
from stillhouse.jobs.publish import check_name, publish_result
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import Context, FailedAt, Listener
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import remember_options, use_options
from stillhouse.storage.run_record import RunRecord, now, read_json
from stillhouse.training.task import RECIPE_VERSION

RUN_VERSION = 1
SUBMISSION_VARIABLE = "STILLHOUSE_SUBMISSION"
"""The id of the submitted job, in its driver's environment; see `stillhouse.jobs.submit`."""


def list_job(spec: Spec) -> Job:
    """Check what a spec names and list its inputs; imports only what its kind of job needs.

    Raises:
        StillhouseError: something does not exist, or does not fit.
    """
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
    from stillhouse.jobs.train import TrainJob

    return TrainJob(spec)


def run_job(spec: Spec, shown: Listener) -> dict[str, Any]:
    """Run a job, or find that there is nothing to do; the object that `run --json` prints.

    Raises:
        MissingExtraError: Ray or the libraries of models are not installed.
        StillhouseError: whatever stopped it; finished parts stay, run again to go on.
    """
    require("ray", "torch", "transformers")
    worker_env = use_options(spec.store, spec.storage_options)
    started = now()
    remember_options(spec.store, spec.storage_options)
    job = list_job(spec)
    store = Store(check_store(spec.store))
    check_name(store, spec)
    job.open(store, remember=True)
    name = run_name(spec, job.identity())
    record = RunRecord(store, name)
    found = finished_result(store, name)
    if found is not None:
        reused = {step: w | {"reused": w["parts"]} for step, w in found["work"].items()}
        published = publish_result(store, spec, found, started)
        return found | {"status": "nothing_to_do", "work": reused} | published
    record.start(spec.to_yaml(), spec.job, os.environ.get(SUBMISSION_VARIABLE), spec.name)
    process.tell_parent(run=record.uri, store=spec.store, options=spec.storage_options)
    ctx = Context(store, spec.compute, Recorder(shown, record), run=name)
    try:
        lost = partial(_end, record) if process.is_supervised() else None
        with cluster(spec.compute, worker_env, spec.num_actors, lost):
            from stillhouse.pipelines.placement import check_placement

            check_placement(
                spec.compute, lambda text: ctx.listener.note("waiting", {"message": text})
            )
            try:
                result = job.run(ctx, record.uri)
            finally:
                ctx.close_pool()
                ctx.metrics("").forget()
    except BaseException as error:
        with suppress(StorageError):  # the store may be what failed
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | LostClusterError)
            state = "stopped" if stopped else "failed"
            failed_at = asdict(ctx.failed_at or FailedAt())
            record.finish(state, process.failure_text(error), failed_at)
        raise
    record.put_result(result)
    record.finish("done")
    return result | publish_result(store, spec, result, started)


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
