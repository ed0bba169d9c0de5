"""`stillhouse run`: one job from its spec to its result, or nothing where all is there already."""

import os
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from stillhouse.errors import LostClusterError, StillhouseError, StorageError, require
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs import supervised
from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.kinds import Spec, list_job, result_artifact
from stillhouse.jobs.paths import identity_of
from stillhouse.jobs.publish import check_name, publish_result
from stillhouse.jobs.recorder import Recorder
from stillhouse.pipelines.context import Context, FailedAt, Listener
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import remember_options, use_options
from stillhouse.storage.run_record import RunRecord, now, read_json
from stillhouse.training.recipe import RECIPE_VERSION

RUN_VERSION = 1
SUBMISSION_VARIABLE = "STILLHOUSE_SUBMISSION"
"""Set by `stillhouse.jobs.entry`: the id of the submitted job."""


def run_job(spec: Spec, shown: Listener) -> dict[str, Any]:
    """Run a job, or find that there is nothing to do.

    Args:
        spec: the job.
        shown: told of progress.

    Returns:
        The object that `run --json` prints.

    Raises:
        MissingExtraError: Ray or the libraries of models are not installed.
        StillhouseError: whatever stopped it; what is finished stays, run again to go on.
    """
    require("ray", "torch", "transformers")
    worker_env = use_options(spec.store, spec.storage_options)
    started = now()
    remember_options(spec.store, spec.storage_options)
    listed = list_job(spec)
    store = Store(check_store(spec.store))
    check_name(store, spec)
    job = listed.open(store, remember=True)
    name = run_name(spec, job.identity())
    record = RunRecord(store, name)
    found = finished_result(store, name)
    if found is not None:
        reused = {step: w | {"reused": w["parts"]} for step, w in found["work"].items()}
        published = publish_result(store, spec, found, started)
        return found | {"status": "nothing_to_do", "work": reused} | published
    record.start(spec.to_yaml(), spec.job, os.environ.get(SUBMISSION_VARIABLE), spec.name)
    supervised.tell(run=record.uri, store=spec.store, options=spec.storage_options)
    ctx = Context(store, spec.compute, Recorder(shown, record), run=name)
    try:
        lost = partial(_end, record) if supervised.is_child() else None
        with cluster(spec.compute, worker_env, spec.num_actors, lost):
            from stillhouse.pipelines.placement import check_placement

            check_placement(
                spec.compute, lambda text: ctx.listener.note("waiting", {"message": text})
            )
            try:
                result = job.run(ctx, record)
            finally:
                ctx.close_pool()
                ctx.metrics("").forget()
    except BaseException as error:
        with suppress(StorageError):  # the store may be what failed
            stopped = isinstance(error, KeyboardInterrupt | SystemExit | LostClusterError)
            state = "stopped" if stopped else "failed"
            record.finish(state, failure_text(error), asdict(ctx.failed_at or FailedAt()))
        raise
    record.put_result(result)
    record.finish("done")
    return result | publish_result(store, spec, result, started)


def _end(record: RunRecord, why: str) -> None:
    """End this process, whose other threads wait for a cluster that is gone."""
    error = LostClusterError(f"{why}: run the same command again once it is up")
    with suppress(StorageError):
        record.finish("stopped", str(error))
    supervised.end(error.exit_code, str(error))


def failure_text(error: BaseException) -> str:
    """What `status` shows of an error: our own in full, of others the line that matters.

    A worker's exception carries its whole traceback, which ends with the exception itself.
    """
    if isinstance(error, StillhouseError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "stopped by a signal"
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Traceback"):
        return lines[-1][:300]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def run_name(spec: Spec, inputs: list[Any]) -> str:
    """The fingerprint of a run: its spec without places and widths, and the content it reads."""
    return fingerprint(["run", RUN_VERSION, RECIPE_VERSION, identity_of(spec), *inputs])


def finished_result(store: Store, name: str) -> dict[str, Any] | None:
    """The result of a finished run whose artifact is still there and whole, or None."""
    result = read_json(store.path("runs", name), "result.json")
    if result is None:
        return None
    kind, made = result_artifact(result)
    return result if store.find_manifest(kind, made) is not None else None
