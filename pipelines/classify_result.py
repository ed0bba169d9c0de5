"""The result of a classifier's training: its numbers, and the sections of its report."""

from typing import Any

import stillhouse.report.blocks as b
from stillhouse.classification.spec import ClassifySpec
from stillhouse.distillation.prepared import DEAD_LETTERS, IMAGES
from stillhouse.pipelines.classify import ClassifyRun
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.results import assemble, automatic, cost_numbers
from stillhouse.pipelines.train_result import CHECKED, speed, training_warnings
from stillhouse.report.formatting import compact, decimals, percent
from stillhouse.storage.filesystem import join


def classify_result(ctx: Context, spec: ClassifySpec, made: ClassifyRun, run_uri: str) -> b.Result:
    """The numbers of `run --json`, and the blocks of the report."""
    totals, settings = made.model.totals, made.task.settings
    measured, last = totals["measured"], totals["evaluations"][-1]
    images = ctx.store.path(IMAGES, made.images.fingerprint)
    artifacts = {"model": ctx.store.path("models", made.model.fingerprint), "images": images}
    if DEAD_LETTERS in made.images.files:
        artifacts["dead_letters"] = join(images, DEAD_LETTERS)
    numbers: dict[str, Any] = {
        "model_fingerprint": made.model.fingerprint,
        "train": {
            "task": spec.task,
            "accuracy": totals["test"]["accuracy"],
            "validation_accuracy": last["accuracy"],
            "nll": totals["test"]["nll"],
            "final_loss": totals["final_loss"],
            "num_images": totals["num_tokens"],
            "num_steps": totals["num_steps"],
            "order_sha256": totals["order_sha256"],
            "images_per_second": measured["tokens_per_second"],
            "data_wait_share": measured["data_wait_share"],
            "learning_rate": settings.peak_rate,
            "global_batch": settings.batch_size,
            "restarts": len(measured["starts"]) - 1,
            "attention": totals["attention"],
            "bag_nll": last.get("bag_nll"),
        },
        "cost": {"device_seconds": cost_numbers(ctx.work)["device_seconds"]},
        "dead_letters": made.images.totals["dead_letters"],
    }
    starts = [[one["step"] * settings.batch_size, one["workers"]] for one in measured["starts"]]
    marks = [units for units, _ in starts[1:]]
    noun = spec.data.kind
    warnings = training_warnings(totals, made.task.label, automatic(spec.train), noun)
    return assemble(
        ctx,
        spec,
        spec.job,
        run_uri,
        title=f"A classifier of {spec.data.dataset or spec.data.path}",
        artifacts=artifacts,
        numbers=numbers,
        warnings=b.Warnings(warnings, CHECKED),
        lead=_lead(made, noun),
        sections=[
            b.Section("learning", "How it learned", _learning(totals, marks, noun)),
            b.Section("speed", "How it ran", speed(totals["points"], starts, marks, noun)),
            b.Section("data", "What it saw", _data(made, noun)),
        ],
        footer=f"The test part is used once, after the last step; losses are means over {noun}, in "
        "nats.",
    )


def _lead(made: ClassifyRun, noun: str) -> list[b.Block]:
    totals = made.model.totals
    measured, test = totals["measured"], totals["test"]
    restarts, workers = len(measured["starts"]) - 1, measured["starts"][-1]["workers"]
    accuracy = percent(test["accuracy"])
    story = (
        f"A network of {compact(totals['num_parameters'])} parameters was trained on "
        f"**{compact(totals['num_tokens'])} {noun}** in {compact(totals['num_steps'])} steps; it "
        f"is right on **{accuracy}** of the test part."
    )
    people = "worker" if workers == 1 else "workers"
    last = totals["evaluations"][-1]
    tiles = [
        b.Fact("Test accuracy", accuracy, f"{decimals(test['nll'])} nats", main=True),
        b.Fact("Validation accuracy", percent(last["accuracy"]), "at the end"),
        b.Fact("Training loss", decimals(totals["points"][-1]["loss"]), "at the end"),
        b.Fact("Throughput", compact(measured["tokens_per_second"]), f"{noun} a second"),
        b.Fact("Restarts", f"{restarts}", f"{workers} {people} at the end"),
    ]
    return [b.Text(story, "story", terminal=True), b.Facts(tiles, terminal=True)]


def _learning(totals: dict[str, Any], marks: list[float], noun: str) -> list[b.Block]:
    evaluations = totals["evaluations"]
    right = [(one["tokens"], 100 * one["accuracy"]) for one in evaluations]
    losses = {
        "trained on": [[(one["tokens"], one["loss"]) for one in totals["points"]]],
        "validation": [[(one["tokens"], one["nll"]) for one in evaluations]],
    }
    charts: list[b.Block] = [
        b.Curves(
            "Right on the validation part",
            {"validation": [right]},
            "validation",
            x_title=f"{noun} trained on",
            y_title="percent",
            marks=marks,
        ),
        b.Curves(
            "Loss", losses, "validation", x_title=f"{noun} trained on", y_title="loss", marks=marks
        ),
    ]
    return [b.Group(charts)]


def _data(made: ClassifyRun, noun: str) -> list[b.Block]:
    settings, totals = made.task.settings, made.model.totals
    names = made.images.totals["class_names"]
    counts = [part.num_rows for part in made.images.parts]
    others, seen = made.task.unlabelled, totals["num_tokens"]
    epochs = seen * (1 - others.share if others else 1) / counts[0]
    columns = {"Part": "text", noun: "compact", "epochs": "decimals2"}
    parts = ("training", "validation", "test")
    rows: list[list[b.Cell]] = [
        [name, count, epochs if i == 0 else None]
        for i, (name, count) in enumerate(zip(parts, counts, strict=True))
    ]
    if others is not None:
        count = others.part.num_rows
        rows.insert(1, ["without labels", count, seen * others.share / count])
    intro = (
        f"Batches of {compact(settings.batch_size)} {noun} of {len(names)} classes, at a learning "
        f"rate of {settings.peak_rate:.2g} at its peak, in an order that does not depend on the "
        "number of workers."
    )
    digest = f"SHA-256 over all {noun} in order: `{totals['order_sha256']}`"
    return [b.Text(intro), b.Table(columns, rows, style="short"), b.Text(digest, "note")]
