"""What a finished distil job says: the object of `run --json`, and the report."""

from statistics import fmean
from typing import Any

from stillhouse.distillation.spec import DistillSpec
from stillhouse.jobs.other_sets import other_sets
from stillhouse.jobs.pages import write_report
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.distill import DistillRun, put_result
from stillhouse.pipelines.distill_report import dead_letters_uri, distill_report
from stillhouse.pipelines.evaluation import Tested
from stillhouse.storage.run_record import RunRecord


def write_distill_outcome(
    ctx: Context, spec: DistillSpec, made: DistillRun, record: RunRecord
) -> dict[str, Any]:
    """Commit the artifact, write the report beside the run's record; the result of the job."""
    manifest, pictures = put_result(ctx, spec, made)
    network, first = next(iter(made.tests.items()))
    others = other_sets(ctx.store, made.images.fingerprint, network, record.uri)
    data = distill_report(ctx, spec, made, pictures, record.uri, others)
    page = write_report(record.uri, data)
    store = ctx.store
    left_out = dead_letters_uri(ctx, made.images)
    return {
        "status": "done",
        "job": "distill",
        "run": record.uri,
        "report": page,
        "artifacts": {
            "images": store.path("images", made.images.fingerprint),
            "learned_from": [
                store.path("trajectories" if spec.matching else "models", name)
                for name in made.made.fingerprints
            ],
            "distilled": store.path("distilled", manifest.fingerprint),
        }
        | ({"dead_letters": left_out} if left_out else {}),
        "distilled_fingerprint": manifest.fingerprint,
        "work": {n: {"parts": w.parts, "reused": w.reused} for n, w in ctx.work.items()},
        "distill": {
            "method": spec.method.name,
            "images_per_class": spec.method.images_per_class,
            "bytes": made.stored.total,
            "validation_accuracy": fmean(made.best.validation),
            "test_accuracy": accuracy(first),
            "networks": _by_network(made.tests),
            "controls": {
                c.name: {
                    "bytes": c.num_bytes,
                    "test_accuracy": accuracy(c.tested),
                    "networks": _by_network(c.tests),
                }
                for c in made.controls
            },
            "judged_by": data.judged_by,
            "seconds": data.rows[0].seconds,
            "iteration": made.best.iteration,
            "learning_rate": made.best.learning_rate,
        },
        "cost": {"device_seconds": {n: round(w.device_seconds, 3) for n, w in ctx.work.items()}},
        "dead_letters": made.images.totals["dead_letters"],
        "warnings": [warning.title for warning in data.warnings],
    }


def _by_network(tests: dict[str, Tested]) -> dict[str, Any]:
    return {name: accuracy(tested) for name, tested in tests.items()}


def accuracy(tested: Tested) -> dict[str, Any]:
    """Mean, deviation and number of seeds."""
    return {"mean": tested.mean, "std": tested.std, "seeds": len(tested.accuracies)}
