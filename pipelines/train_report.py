"""Gathering what the report of a train job shows from its model's manifest."""

from typing import Any

from stillhouse.pipelines.context import Context
from stillhouse.pipelines.report import environment
from stillhouse.pipelines.train import TrainRun
from stillhouse.report.data import HealthWarning, StepCost
from stillhouse.report.health import unfinished
from stillhouse.report.training import DataRow, Points, SourceCurve, Start, TrainingReport
from stillhouse.storage.run_record import now
from stillhouse.training.divergence import late_fall
from stillhouse.training.spec import TrainSpec

_MOST_WAIT = 0.05


def training_report(ctx: Context, spec: TrainSpec, made: TrainRun, run_uri: str) -> TrainingReport:
    """Everything the page shows, as plain numbers and texts."""
    totals, task = made.model.totals, made.task
    measured, points = totals["measured"], totals["points"]
    batch_tokens = task.settings.batch_size * task.sequence_length

    def curve(key: str) -> Points:
        return [(point["tokens"], point[key]) for point in points]

    return TrainingReport(
        title=spec.name or "Training",
        created=now(),
        run_uri=run_uri,
        num_parameters=totals["num_parameters"],
        num_tokens=totals["num_tokens"],
        num_steps=totals["num_steps"],
        global_batch=task.settings.batch_size,
        learning_rate=task.settings.peak_rate,
        sequence_length=task.sequence_length,
        heldout=[(tokens, nll) for tokens, nll in totals["curve"]],
        loss=curve("loss"),
        tokens_per_s=curve("tokens_per_s"),
        data_wait=curve("data_wait_share"),
        grad_norm=curve("grad_norm"),
        mean_tokens_per_s=measured["tokens_per_second"],
        data_wait_share=measured["data_wait_share"],
        mfu=measured["mfu"],
        starts=[Start(one["step"] * batch_tokens, one["workers"]) for one in measured["starts"]],
        sources=_sources(totals["evaluations"]),
        data=_data(made),
        order_sha256=totals["order_sha256"],
        costs=[
            StepCost(
                name,
                work.tokens,
                work.flops,
                work.seconds,
                None,
                work.parts > 0 and work.reused == work.parts,
            )
            for name, work in ctx.work.items()
        ],
        warnings=training_warnings(made),
        spec_yaml=spec.to_yaml(),
        artifacts=[
            ("model", ctx.store.path("models", made.model.fingerprint)),
            ("tokenizer", made.tokenizer.path),
        ],
        environment=environment(),
    )


def training_warnings(made: TrainRun) -> list[HealthWarning]:
    """What is worth a look: waiting for data, a micro-batch that had to be halved."""
    measured = made.model.totals["measured"]
    losses = [point["loss"] for point in made.model.totals["points"]]
    found = [*unfinished([(made.task.label, late_fall(losses))])]
    if measured["data_wait_share"] > _MOST_WAIT:
        found.append(
            HealthWarning(
                f"The training waited for data {measured['data_wait_share']:.0%} of its time.",
                "The store may be slow or far away; larger row groups or parts help.",
            )
        )
    if measured["halved_to"] is not None:
        found.append(
            HealthWarning(
                f"The micro-batch was halved to {measured['halved_to']} sequences.",
                "The device's memory did not hold more; the global batch stayed as it was.",
            )
        )
    return found


def _sources(evaluations: list[dict[str, Any]]) -> list[SourceCurve]:
    """Curves by source, those with the most tokens first."""
    names = {name for one in evaluations for name in (*one["heldout"], *one["trained"])}

    def points(kind: str, name: str) -> Points:
        return [(one["tokens"], one[kind][name]["nll"]) for one in evaluations if name in one[kind]]

    def tokens(name: str) -> int:
        kinds = ("heldout", "trained")
        return sum(
            one[k][name]["num_tokens"] for one in evaluations for k in kinds if name in one[k]
        )

    found = [SourceCurve(name, points("heldout", name), points("trained", name)) for name in names]
    return sorted(found, key=lambda one: (not one.heldout, -tokens(one.name), one.name))


def _data(made: TrainRun) -> list[DataRow]:
    total = sum(one.weight for one in made.datasets)
    drawn = made.model.totals["num_steps"] * made.task.settings.batch_size
    return [
        DataRow(
            one.name, one.weight / total, one.num_rows, drawn * one.weight / total / one.num_rows
        )
        for one in made.datasets
    ]
