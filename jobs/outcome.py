"""What a finished select job says: the object of `run --json`, and the report."""

from dataclasses import asdict
from statistics import fmean
from typing import Any

from stillhouse.jobs.pages import write_report
from stillhouse.pipelines.context import Context, StepWork
from stillhouse.pipelines.report import report_data
from stillhouse.pipelines.scan import dead_letters_uri
from stillhouse.pipelines.select import SelectRun
from stillhouse.report.data import ReportData, TrainingRow
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.run_record import RunRecord

_MAIN_SCORES = {"score prior", "score conditional", "score"}


def write_outcome(
    ctx: Context, spec: SelectSpec, made: SelectRun, record: RunRecord
) -> dict[str, Any]:
    """Write the report beside the run's record; the result of the job."""
    data = report_data(ctx, spec, made, record.uri)
    report = write_report(record.uri, data)
    return outcome(ctx, made, record.uri, report, data)


def outcome(
    ctx: Context, made: SelectRun, run_uri: str, report: str, data: ReportData
) -> dict[str, Any]:
    """The object that `run --json` prints."""
    store, kept = ctx.store, made.kept

    def uri(manifest: Manifest) -> str:
        return store.path(manifest.kind, manifest.fingerprint)

    sources = {
        name: {"pool_tokens": s.pool_tokens, "kept_tokens": s.kept_tokens}
        for name, s in sorted(kept.tally.sources.items())
    }
    return {
        "status": "done",
        "job": "select",
        "run": run_uri,
        "report": report,
        "artifacts": {
            "tokens": uri(made.pool.manifest),
            "target_tokens": uri(made.target.manifest),
            "heldout_tokens": uri(made.heldout.manifest),
            "tokenizer": made.tokenizer.path,
            "prior": made.prior.folder if made.prior else None,
            "conditional": made.conditional.folder if made.conditional else None,
            "scores": {n: uri(s.manifest) for n, s in made.candidates.scores.items()},
            "heldout_scores": {
                n: [store.path(path) for path in s.heldout]
                for n, s in made.candidates.scores.items()
                if s.heldout
            },
            "selection": uri(kept.manifest),
            "controls": {n: uri(s.manifest) for n, s in made.selections.items() if s is not kept},
            "dead_letters": dead_letters_uri(ctx, made.scanned),
            "targets": {n: [uri(m) for m in models] for n, models in made.targets.items()},
        },
        "selection_fingerprint": kept.manifest.fingerprint,
        "work": _select_work(ctx.work),
        "selection": {
            "num_sequences": kept.manifest.num_rows,
            "num_tokens": kept.manifest.num_tokens,
            "threshold": kept.threshold,
            "sources": sources,
            "fates": dict(kept.tally.fates),
        },
        "dropped": {d.reason: d.documents for d in data.drops if d.documents is not None},
        "dead_letters": data.dead_letters.total,
        "training": {row.name: _training(row) for row in data.trainings},
        "target": {name: _target(models) for name, models in made.targets.items()},
        "cost": {
            "flops": {name: work.flops for name, work in ctx.work.items() if work.flops},
            "device_seconds": {
                name: round(work.device_seconds, 3) for name, work in ctx.work.items()
            },
            "paper": data.paper,
        },
        "warnings": [warning.title for warning in data.warnings],
    }


def work_of(steps: dict[str, StepWork]) -> dict[str, dict[str, int]]:
    """Parts in all and parts reused, by step."""
    return {name: {"parts": w.parts, "reused": w.reused} for name, w in steps.items()}


def _select_work(steps: dict[str, StepWork]) -> dict[str, dict[str, int]]:
    """The same; `scores` adds up both models, or a user's scorer."""
    shown = work_of(steps)
    both = [w for name, w in shown.items() if name in _MAIN_SCORES]
    total = {key: sum(w[key] for w in both) for key in ("parts", "reused")}
    return shown | {"scores": total}


def _training(row: TrainingRow) -> dict[str, Any]:
    shown = asdict(row)
    return {key: shown[key] for key in shown if key != "name"}


def _target(models: list[Manifest]) -> dict[str, Any]:
    losses = [model.totals["curve"][-1][1] for model in models]
    return {
        "heldout_nll": fmean(losses),
        "heldout_nll_by_seed": losses,
        "num_tokens": models[0].totals["num_tokens"],
    }
