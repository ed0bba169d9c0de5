"""`stillhouse plan`: what a run would find finished, and what the rest would cost.

Listings, footers, manifests and known digests are looked at, never the input files themselves;
nothing is computed. The pipeline is walked up to the first step with something to do: so far the
figures are exact. Behind it tokens are estimated from bytes; seconds are those of earlier runs of
the store, if there are any.
"""

from typing import Any

from stillhouse.jobs.kinds import Spec, speeds_of
from stillhouse.jobs.run import finished_result, list_job, run_name
from stillhouse.pipelines.context import Context, Listener, Unfinished
from stillhouse.report.formatting import number_of
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.filesystem import absolute_uri, use_options

_MAX_NAMED = 5


class _ReadOnlyStore(Store):
    """A store that nothing is written to."""

    def put_manifest(self, manifest: Manifest) -> Manifest:
        return manifest

    def put_receipt(self, kind: str, receipt: Receipt) -> Receipt:
        return receipt


def plan_job(spec: Spec) -> dict[str, Any]:
    """What `run` would do with this spec, without doing it or writing anything.

    Returns:
        `steps` by name (parts or None where not known yet, reused, tokens, flops, seconds or None)
        and `notes` in words.

    Raises:
        StillhouseError: inputs that cannot be listed or read.
    """
    use_options(spec.store, spec.storage_options)
    store = _ReadOnlyStore(absolute_uri(spec.store))
    job = list_job(spec).open(store, remember=False)
    name = run_name(spec, job.identity())
    finished = finished_result(store, name) is not None
    ctx = Context(store, spec.compute, Listener(), dry=True)
    stopped = None
    try:
        job.walk(ctx)
    except Unfinished as error:
        stopped = str(error)
    steps = job.estimate(ctx, speeds_of(store), complete=stopped is None)
    return {
        "status": "nothing_to_do" if finished else "to_do",
        "job": spec.job,
        "run": store.path("runs", name),
        "steps": steps,
        "notes": ["nothing to do: this spec and these inputs have a finished run"]
        if finished
        else _notes(stopped, steps, sorted(set(store.unread))),
    }


def _notes(stopped: str | None, steps: dict[str, Any], new: list[str]) -> list[str]:
    notes: list[str] = []
    if new:
        more = f" and {len(new) - _MAX_NAMED} more" if len(new) > _MAX_NAMED else ""
        notes.append(
            f"taken for new, as no run of this store read them: {', '.join(new[:_MAX_NAMED])}{more}"
        )
    left = [step["seconds"] for step in steps.values() if step["seconds"] != 0]
    timed = [seconds for seconds in left if seconds is not None]
    if timed:
        steps_timed = number_of(len(timed), "step")
        notes.append(f"about {sum(timed):,.0f} s for {steps_timed}, as earlier runs took")
    if len(timed) < len(left):
        unknown = number_of(len(left) - len(timed), "step")
        notes.append(f"no earlier run of this store tells the time of {unknown}")
    if stopped:
        tokens = any(step["tokens"] is not None for step in steps.values())
        behind = "tokens are estimated from bytes" if tokens else "nothing is known yet"
        notes.append(f"exact up to `{stopped}`; behind it {behind}")
    return notes
