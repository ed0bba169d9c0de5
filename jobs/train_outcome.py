"""What a finished train job says: the object of `run --json`, and the report."""

from typing import Any

from stillhouse.jobs.outcome import work_of
from stillhouse.jobs.pages import write_report
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.train import TrainRun
from stillhouse.pipelines.train_report import training_report
from stillhouse.report.training import TrainingReport
from stillhouse.storage.run_record import RunRecord
from stillhouse.training.spec import TrainSpec


def write_train_outcome(
    ctx: Context, spec: TrainSpec, made: TrainRun, record: RunRecord
) -> dict[str, Any]:
    """Write the report beside the run's record; the result of the job."""
    data = training_report(ctx, spec, made, record.uri)
    return train_outcome(ctx, made, record.uri, write_report(record.uri, data), data)


def train_outcome(
    ctx: Context, made: TrainRun, run_uri: str, report: str, data: TrainingReport
) -> dict[str, Any]:
    """The object that `run --json` prints."""
    totals = made.model.totals
    measured, curve = totals["measured"], totals["curve"]
    return {
        "status": "done",
        "job": "train",
        "run": run_uri,
        "report": report,
        "artifacts": {
            "model": ctx.store.path("models", made.model.fingerprint),
            "tokenizer": made.tokenizer.path,
        },
        "model_fingerprint": made.model.fingerprint,
        "work": work_of(ctx.work),
        "train": {
            "heldout_nll": curve[-1][1] if curve else None,
            "final_loss": totals["final_loss"],
            "num_tokens": totals["num_tokens"],
            "num_steps": totals["num_steps"],
            "learning_rate": made.task.settings.peak_rate,
            "global_batch": made.task.settings.batch_size,
            "order_sha256": totals["order_sha256"],
            "tokens_per_second": measured["tokens_per_second"],
            "data_wait_share": measured["data_wait_share"],
            "mfu": measured["mfu"],
            "restarts": len(measured["starts"]) - 1,
            "sources": totals["evaluations"][-1]["heldout"],
        },
        "cost": {
            "flops": {name: work.flops for name, work in ctx.work.items() if work.flops},
            "device_seconds": {
                name: round(work.device_seconds, 3) for name, work in ctx.work.items()
            },
        },
        "warnings": [warning.title for warning in data.warnings],
    }
