"""The result of a distil job: its numbers, and the sections of its report."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.distillation.matching import TrajectoryMethod
from stillhouse.distillation.prepared import DEAD_LETTERS, IMAGES
from stillhouse.distillation.spec import DistillSpec, Method
from stillhouse.errors import ArtifactError
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.distill import DistillRun, Pictures, SetSnapshot
from stillhouse.pipelines.evaluation import Tested
from stillhouse.pipelines.results import assemble, cost_numbers, mean_std
from stillhouse.report.formatting import compact, decimals, percent, words
from stillhouse.storage.artifact import Manifest, Store, load_manifest
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.run_record import read_json

_MAX_CLASSES = 100
_MOST_POINTS = 200
_CHECKED = (
    "Divergence, better real images of equal bytes, a start that nothing improved on, and a set "
    "that was still improving were checked."
)


def distill_result(
    ctx: Context,
    spec: DistillSpec,
    made: DistillRun,
    committed: tuple[Manifest, Pictures],
    run_uri: str,
) -> b.Result:
    """The result of a job; `committed` is the delivered artifact and its pictures."""
    manifest, pictures = committed
    seconds = max(one.seconds for one in made.made.snapshots)
    recipe = spec.protocol(len(_classes(made)), made.best.learning_rate).recipe
    judged_by = f"{spec.protocol_name}, {recipe.epochs} epochs"
    images = ctx.store.path(IMAGES, made.images.fingerprint)
    artifacts: dict[str, Any] = {
        "images": images,
        "learned_from": list(made.made.learned_from),
        "distilled": ctx.store.path("distilled", manifest.fingerprint),
    }
    if DEAD_LETTERS in made.images.files:
        artifacts["dead_letters"] = join(images, DEAD_LETTERS)
    numbers = {
        "distilled_fingerprint": manifest.fingerprint,
        "distill": {
            "method": spec.method.name,
            "images_per_class": spec.method.images_per_class,
            "bytes": made.stored.total,
            "validation_accuracy": fmean(made.best.validation),
            "test_accuracy": made.tested.numbers(),
            "networks": _by_network(made.tests),
            "controls": {
                c.name: {
                    "bytes": c.num_bytes,
                    "test_accuracy": c.tested.numbers(),
                    "networks": _by_network(c.tests),
                }
                for c in made.controls
            },
            "judged_by": judged_by,
            "seconds": seconds,
            "iteration": made.best.iteration,
            "learning_rate": made.best.learning_rate,
        },
        "cost": {"device_seconds": cost_numbers(ctx.work)["device_seconds"]},
        "dead_letters": made.images.totals["dead_letters"],
    }
    name = paper_name(spec.method.name)
    size = spec.method.images_per_class, made.stored.total, mean_std(made.tested.accuracies)
    others = other_sets(ctx.store, made.images.fingerprint, next(iter(made.tests)), run_uri)
    others.insert(0, [f"{name}, this one", *size, judged_by, seconds, ""])
    return assemble(
        ctx,
        spec,
        spec.job,
        run_uri,
        title=f"{name} on {spec.data.dataset or spec.data.path}",
        artifacts=artifacts,
        numbers=numbers,
        warnings=b.Warnings(_warnings(spec, made), _CHECKED),
        lead=_lead(made, spec),
        sections=[
            b.Section("images", "What a network learns from", _images(spec, made, pictures)),
            b.Section("change", "How they changed", _stages(made, pictures)),
            b.Section("progress", "How it went", _progress(spec, made)),
            b.Section(
                "methods",
                "Against sets of equal bytes",
                _methods(made, [name, [None, made.tested.mean], *size, seconds]),
            ),
            b.Section("others", "Other sets of these images", _others(others)),
            b.Section("networks", "On other networks", _networks(spec, made)),
        ],
    )


def _by_network(tests: Mapping[str, Tested]) -> dict[str, Any]:
    return {name: tested.numbers() for name, tested in tests.items()}


def paper_name(method: str) -> str:
    """A method's name as its paper writes it."""
    return {"sre2l": "SRe2L"}.get(method, method.replace("_", "-").upper())


def _classes(made: DistillRun) -> list[str]:
    return made.images.totals["class_names"]


def _guides(spec: DistillSpec) -> str:
    return "experts" if spec.matching else "teachers"


def _lead(made: DistillRun, spec: DistillSpec) -> list[b.Block]:
    best, tested = made.best, made.tested
    budget = spec.method.images_per_class * len(_classes(made))
    count = best.part.num_rows
    story = f"{compact(made.images.parts[0].num_rows)} images became **{count}**"
    story += f", in the space of {budget}" if count > budget else ""
    single = best.learning_rate is not None and spec.method.images_per_class == 1
    story += ", one for each class" if single else ""
    story += ". A fresh network that sees nothing else is right on "
    story += f"**{percent(tested.mean)}** of the test part"
    seeds = f"{len(tested.accuracies)} fresh networks"
    if len(tested.accuracies) > 1:
        seeds += f", ± {decimals(100 * tested.std, 1)}"
    tiles = [b.Fact("Test accuracy", percent(tested.mean), seeds, main=True)]
    random = next((c for c in made.controls if c.name == "random_real"), None)
    if random is not None:
        value, each = percent(random.tested.mean), round(random.images_per_class, 1)
        story += f"; with random real images of as many bytes, on {value}"
        noun = "image" if each == 1 else "images"
        note = f"of as many bytes: {each:g} {noun} a class"
        tiles.append(b.Fact("Random real images", value, note))
    size = f"bytes, {compact(made.stored.labels)} of labels"
    tiles += [
        b.Fact("Validation accuracy", percent(fmean(best.validation)), "what was chosen on"),
        b.Fact("Size", compact(made.stored.total), size),
    ]
    if best.learning_rate is not None:
        rate = decimals(best.learning_rate, 4)
        tiles.append(b.Fact("Learning rate", rate, "learned with the images"))
    if made.made.peak_bytes:
        memory = decimals(made.made.peak_bytes / 2**20, 0)
        tiles.append(b.Fact("Memory", memory, "MiB at most, of the worker"))
    return [b.Text(f"{story}.", "story", terminal=True), b.Facts(tiles, terminal=True)]


def _images(spec: DistillSpec, made: DistillRun, pictures: Pictures) -> list[b.Block]:
    names = _classes(made)
    from_start = len(made.made.snapshots) > 1 or bool(made.made.starts)
    rows = [
        b.ImageRow(name, _png(pictures.made.get(label, [])), _png(pictures.starts.get(label, [])))
        for label, name in enumerate(names[:_MAX_CLASSES])
    ]
    single = spec.method.images_per_class == 1
    if single:
        rows = [b.ImageRow(row.name, row.images[:1], row.beside[:1]) for row in rows]
        intro = "Small, a real image of each class; large, the one that was made."
        if from_start:
            intro = "Small, the real image that each class began as; large, what "
            intro += f"{compact(made.best.iteration)} updates made of it."
    else:
        intro = "Every row a class: [kept: synthetic] large, and the [pool: real] images "
        intro += f"{'they began as' if from_start else 'of the class'} beneath"
        shown = len(rows[0].images)
        more = made.best.part.num_rows > shown * len(names)
        intro += f"; the first {shown} of each class." if more else "."
    if len(names) > len(rows):
        intro += f" The first {len(rows)} of {len(names)} classes."
    intro += " Values beyond black and white are cut off in pictures, not in the set."
    return [b.Text(intro), b.Images(rows, "pairs" if single else "strips")]


def _png(images: Sequence[bytes]) -> list[str]:
    return [b64encode(png).decode() for png in images]


def _stages(made: DistillRun, pictures: Pictures) -> list[b.Block]:
    kept, classes = made.best.iteration, len(_classes(made))
    rows = [
        b.ImageRow(
            f"{compact(iteration)}{' kept' if iteration == kept else ''}",
            _png([images[0] for _, images in sorted(by_class.items())[:10]]),
            main=iteration == kept,
        )
        for iteration, by_class in pictures.by_iteration.items()
    ]
    intro = (
        f"The first image of {'every class' if classes <= 10 else 'ten classes'}, after so many "
        f"updates. The set of {compact(kept)} was kept: the best on the validation part."
    )
    labels = ("updates:", "")
    return [b.Text(intro), b.Images(rows, "stages", labels)] if len(rows) > 1 else []


def _progress(spec: DistillSpec, made: DistillRun) -> list[b.Block]:
    charts: list[b.Block] = []

    def add(caption: str, name: str, seeds: list[b.Points], y: str, x: str = "updates") -> None:
        caption += "; band: all of them" if len(seeds) > 1 else ""
        charts.append(b.Curves(caption, {name: seeds}, name, x, y, settled_from=0.0))

    snapshots, guide_losses = made.made.snapshots, made.made.guide_losses
    losses = [loss for one in snapshots for loss in one.losses]
    if len(losses) > 1:
        caption = "Loss of the first of the units that were made one by one"
        if spec.matching:
            caption = "Matching loss: 1 is no progress, 0 is where the expert went"
        add(caption, "synthetic", [smoothed(losses)], "matching loss" if spec.matching else "loss")
    if len(snapshots) > 1:
        seeds = range(len(made.best.validation))
        curves = [[(float(one.iteration), one.validation[s]) for one in snapshots] for s in seeds]
        add("Accuracy on the validation part", "synthetic", curves, "validation accuracy")
    if guide_losses:
        curves = [[(float(n), x) for n, x in enumerate(of, 1)] for of in guide_losses]
        guides = _guides(spec)
        add(f"Training loss of {len(curves)} {guides}", guides, curves, "loss", "epochs")
    return [b.Group(charts)] if charts else []


def smoothed(losses: Sequence[float]) -> b.Points:
    """At most 200 points (last iteration, mean loss) of equal stretches."""
    width = max(1, -(-len(losses) // _MOST_POINTS))
    stretches = [(i, losses[i : i + width]) for i in range(0, len(losses), width)]
    return [(float(start + len(part)), fmean(part)) for start, part in stretches]


def _methods(made: DistillRun, own: list[b.Cell]) -> list[b.Block]:
    rows = [own]
    for c in made.controls:
        each: b.Cell = round(c.images_per_class, 1) if c.images_per_class else "all"
        cells = [c.tested.mean, None], each, c.num_bytes, mean_std(c.tested.accuracies)
        rows.append([words(c.name), *cells, None])
    columns = {"Set": "text", "share": "bars wide", "images a class": "short", "bytes": "compact"}
    columns |= {"accuracy, %": "hundredths", "time to make": "duration wide"}
    intro = (
        "Accuracy in percent on the test part, which was looked at once, after everything had been "
        "chosen. Bytes are what a set costs to store, labels included."
    )
    note = (
        f"Mean ± standard deviation over {len(made.tested.accuracies)} fresh networks. Experts or "
        "teachers are not in the time: they serve every method."
    )
    table = b.Table(columns, rows, main=str(own[0]), terminal=True)
    return [b.Text(intro), table, b.Text(note, "note")]


def other_sets(store: Store, images: str, network: str, own_run: str) -> list[list[b.Cell]]:
    """The sets of other runs on `images` that were evaluated on `network`; a request a run.

    Rows of method, images a class, bytes, accuracy, how it was evaluated, seconds and run, sorted
    by images a class and method.
    """
    runs = store.path("runs")
    rows: list[list[b.Cell]] = []
    for name in list_names(runs):
        try:
            result = None if join(runs, name) == own_run else read_json(runs, f"{name}/result.json")
        except ArtifactError:  # a broken one does not concern this job
            continue
        if result is None or result["artifacts"].get("images") != store.path(IMAGES, images):
            continue
        other = result.get("distill", {})
        if "judged_by" in other and network in other["networks"]:
            tested = other["networks"][network]
            accuracy = [tested["mean"], tested["std"] or None]
            cells = [paper_name(other["method"]), other["images_per_class"], other["bytes"]]
            rows.append([*cells, accuracy, other["judged_by"], other["seconds"], name[:12]])
    return sorted(rows, key=lambda row: (row[1], row[0], row[-1]))  # type: ignore[return-value]


def _others(rows: list[list[b.Cell]]) -> list[b.Block]:
    columns = {"Method": "text", "images a class": "compact", "bytes": "compact"}
    columns |= {"accuracy, %": "hundredths", "networks trained by": "text"}
    columns |= {"time to make": "duration", "run": "code"}
    intro = (
        "What other jobs of this store made of them, evaluated on the same network. Accuracies "
        f"compare where networks were trained alike: here by {rows[0][4]}."
    )
    return [b.Text(intro), b.Table(columns, rows, main=str(rows[0][0]))] if rows[1:] else []


def _networks(spec: DistillSpec, made: DistillRun) -> list[b.Block]:
    """The set on every network, beside the controls."""
    if len(made.tests) < 2:
        return []
    columns = {"Network": "text", paper_name(spec.method.name): "hundredths"}
    columns |= {words(c.name): "hundredths" for c in made.controls}
    tables = [made.tests, *(c.tests for c in made.controls)]
    rows: list[list[b.Cell]] = [
        [name, *(mean_std(tests[name].accuracies) for tests in tables)] for name in made.tests
    ]
    labels = ", ".join(n.label for n in spec.teachers or [spec.network])
    intro = f"The same set, {'made with' if spec.matching else 'taught by'} {labels}"
    intro += f"{', beside the same baselines' if made.controls else ''}. Accuracies in percent."
    return [b.Text(intro), b.Table(columns, rows, main=next(iter(made.tests)))]


def num_skipped(method: Method, snapshots: Sequence[SetSnapshot]) -> int:
    """Skipped iterations: those with a loss above `max_loss` or, not recorded, not finite."""
    if not isinstance(method, TrajectoryMethod) or method.max_loss is None:
        return 0
    losses = chain.from_iterable(one.losses for one in snapshots)
    return snapshots[-1].iteration - sum(loss <= method.max_loss for loss in losses)


def _warnings(spec: DistillSpec, made: DistillRun) -> list[b.Warn]:
    warnings: list[b.Warn] = []
    mean, snapshots = made.tested.mean, made.made.snapshots

    def warn(title: str, detail: str) -> None:
        warnings.append(b.Warn(title, detail))

    if made.made.diverged is not None:
        title = "The matching loss diverged; the best set before it was kept."
        warn(title, made.made.diverged)
    as_good = [c for c in made.controls if c.images_per_class and c.tested.mean >= mean]
    if as_good:
        reached = ", ".join(f"{words(c.name)} {c.tested.mean:.3f}" for c in as_good)
        warn(
            "Real images of equal bytes are as good.",
            f"Test accuracy of {reached}; of the synthetic ones {mean:.3f}: give more "
            f"iterations, other step sizes or better {_guides(spec)}.",
        )
    skipped, last = num_skipped(spec.method, snapshots), snapshots[-1].iteration
    if skipped > last / 2:
        warn(
            f"{skipped:,} of {last:,} iterations were skipped.",
            "Their loss was above `method.max_loss`, or not finite: raise it, or lower "
            "`method.max_start_epoch`.",
        )
    if len(snapshots) > 1 and made.best.iteration == 0:
        warn(
            "No set along the way was better than the images it started from.",
            "The real start was kept: lower `method.image_rate`, or give more `experts`.",
        )
    if made.chosen == len(snapshots) - 1 > 1:
        warn(
            "The last set was the best: it may not be finished.",
            "Validation accuracy still rose: raise `method.num_iterations`.",
        )
    uris = (spec.experts.path if spec.experts is not None else None) or []
    trained_on = [load_manifest(uri).inputs.get("images") for uri in uris]
    if others := sum(images not in (None, made.images.fingerprint) for images in trained_on):
        warn(
            f"{others} of {len(uris)} experts saw other images.",
            "`experts.path` names trajectories of another data set, split or subset.",
        )
    if unread := made.images.totals["dead_letters"]:
        warn(
            f"{unread} images could not be read.",
            "They and the reasons stand in `dead_letters.parquet` of the artifact `images`.",
        )
    return warnings
