"""`stillhouse run`: one job from its spec to its result, or nothing where all is there already."""

from contextlib import suppress
from typing import Any

from jobs.cluster import cluster
from jobs.publish import check_name, publish_result
from jobs.recorder import Recorder
from pipelines.context import Context, Listener
from pipelines.given import check_given, given_identity
from pipelines.inputs import JobInputs, list_job_inputs, open_job_inputs
from stillhouse.errors import StillhouseError, StorageError
from stillhouse.fingerprint import fingerprint
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import exists, use_options
from stillhouse.storage.run_record import RunRecord, now, read_json

RUN_VERSION = 1
_NOT_IDENTITY = {"compute", "name", "store", "storage_options", "publish"}


def run_job(spec: SelectSpec, shown: Listener) -> dict[str, Any]:
    """Run a job, or find that there is nothing to do.

    Args:
        spec: the job.
        shown: told of progress.

    Returns:
        The object that `run --json` prints.

    Raises:
        StillhouseError: whatever stopped it; what is finished stays, run again to go on.
    """
    worker_env = use_options(spec.store, spec.storage_options)
    started = now()
    check_given(spec)
    listed = list_job_inputs(spec)
    store = Store(check_store(spec.store))
    check_name(store, spec)
    inputs = open_job_inputs(store, spec, listed)
    name = run_name(spec, inputs, given_identity(store, spec, remember=True))
    record = RunRecord(store, name)
    found = finished_result(store, name)
    if found is not None:
        reused = {step: w | {"reused": w["parts"]} for step, w in found["work"].items()}
        published = publish_result(store, spec, found, started)
        return found | {"status": "nothing_to_do", "work": reused} | published
    record.start(spec.to_yaml(), spec.job)
    try:
        with cluster(spec.compute, worker_env):
            result = _run(spec, store, inputs, record, shown)
    except BaseException as error:
        message = str(error) if isinstance(error, StillhouseError) else type(error).__name__
        with suppress(StorageError):  # the store may be what failed
            record.finish("failed", message)
        raise
    record.put_result(result)
    record.finish("done")
    return result | publish_result(store, spec, result, started)


def _run(
    spec: SelectSpec, store: Store, inputs: JobInputs, record: RunRecord, shown: Listener
) -> dict[str, Any]:
    from jobs.outcome import write_outcome
    from pipelines.select import run_select

    ctx = Context(store, spec.compute, Recorder(shown, record))
    made = run_select(ctx, spec, inputs)
    return write_outcome(ctx, spec, made, record)


def run_name(spec: SelectSpec, inputs: JobInputs, given: list[str | None]) -> str:
    """The fingerprint of a run: its spec without places and widths, and the content it reads.

    `given` is that of models, tokenizer and threshold that the spec names by path.
    """
    asked = spec.model_dump(mode="json", exclude=_NOT_IDENTITY)
    for section in ("pool", "target"):
        asked[section].pop("path")
    if isinstance(asked["target"]["heldout"], dict):
        asked["target"]["heldout"].pop("path")
    for section, key in (
        ("prior", "path"),
        ("conditional", "path"),
        ("tokenizer", "path"),
        ("selection", "threshold_from"),
    ):
        asked[section].pop(key)
    return fingerprint(["run", RUN_VERSION, asked, inputs.identity(), given])


def finished_result(store: Store, name: str) -> dict[str, Any] | None:
    """The result of a finished run whose selection is still there, or None."""
    result = read_json(store.path("runs", name), "result.json")
    if result is None:
        return None
    manifest = store.path("selections", result["selection_fingerprint"], "manifest.json")
    return result if exists(manifest) else None
