"""What the results of all jobs have in common: numbers of the run, cost, and how to repeat it."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import compress
from statistics import fmean, stdev
from typing import Any

import stillhouse.report.blocks as b
from stillhouse import __version__
from stillhouse.pipelines.context import Context, StepWork
from stillhouse.report.formatting import words
from stillhouse.spec import JobSpec, Optimisation
from stillhouse.storage.filesystem import join
from stillhouse.storage.run_record import now

_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy")


def assemble(
    ctx: Context,
    spec: JobSpec,
    job: str,
    run_uri: str,
    *,
    title: str,
    artifacts: Mapping[str, Any],
    numbers: Mapping[str, Any],
    warnings: b.Warnings,
    lead: Sequence[b.Block],
    sections: Iterable[b.Section],
    cost: Sequence[b.Block] = (),
    footer: str = "",
    forward: float | None = None,
) -> b.Result:
    """A job's result from what is its own: `numbers` beside those of every job, and `sections`.

    `cost` stands below the steps' costs; `forward` is the FLOPs a token of the paper's unit.
    """
    common = {
        "status": "done",
        "job": job,
        "run": run_uri,
        "report": join(run_uri, "report.html"),
        "artifacts": dict(artifacts),
        "work": {name: {"parts": w.parts, "reused": w.reused} for name, w in ctx.work.items()},
        "warnings": [warning.title for warning in warnings.warnings],
    }
    uris = [b.Fact(words(name), uri) for name, uri in _flat(artifacts)]
    versions = [b.Fact("stillhouse", __version__)]
    versions += [b.Fact(name, version(name)) for name in _LIBRARIES]
    whole = [
        b.Section("lead", "", [*lead]),
        b.Section("health", "", [warnings]),
        *(section for section in sections if section.blocks),
        b.Section("cost", "What it cost", [_cost(ctx.work, forward), *cost]),
        b.Section(
            "provenance",
            "How to repeat it",
            [
                b.Group([b.Text(spec.to_yaml(), "code")], "The spec, with every default"),
                b.Group([b.Facts(uris, "list")], f"{len(uris)} artifacts"),
                b.Group([b.Facts(versions, "list")], "Environment"),
            ],
        ),
    ]
    return b.Result(job, spec.name or title, now(), {**common, **numbers}, whole, footer)


def cost_numbers(work: Mapping[str, StepWork]) -> dict[str, Any]:
    """FLOPs and busy time by step."""
    return {
        "flops": {name: step.flops for name, step in work.items() if step.flops},
        "device_seconds": {name: round(step.device_seconds, 3) for name, step in work.items()},
    }


def mean_std(values: Sequence[float]) -> list[float | None]:
    """Mean, and the sample standard deviation (None of a single value): a cell of a table."""
    return [fmean(values), stdev(values) if len(values) > 1 else None]


def plus_minus(values: Sequence[float], places: int = 3) -> str:
    """The same as text: `0.512 ± 0.003`."""
    mean, deviation = mean_std(values)
    return f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


def automatic(settings: Optimisation | None) -> bool:
    """Whether learning rate and batch were chosen by rule."""
    return settings is not None and settings.learning_rate == settings.global_batch == "auto"


_COST = {
    "Step": "text",
    "share of the compute": "bars wide",
    "tasks": "compact wide",
    "reused": "compact wide",
    "tokens": "compact",
    "compute": "flops",
    "time": "duration",
    "worker time": "duration wide",
    "paper's units": "compact wide",
}


def _cost(steps: Mapping[str, StepWork], forward: float | None) -> b.Table:
    """Work by step, and the time that this run took; without columns that would be empty."""
    most = max((step.flops for step in steps.values()), default=0) or 1

    def row(name: str, done: Sequence[StepWork], fresh: Sequence[StepWork]) -> list[b.Cell]:
        flops = sum(step.flops for step in done)
        share = flops / most if flops and len(done) == 1 else None
        return [
            name,
            [] if share is None else [None, share] if fresh else [share],
            sum(step.parts for step in done),
            sum(step.reused for step in done) or None,
            sum(step.tokens for step in done) or None,
            flops or None,
            sum(step.seconds for step in fresh) or None,
            sum(step.device_seconds for step in fresh) or None,
            flops / forward if forward and flops else None,
        ]

    rows, fresh = list[list[b.Cell]](), list[StepWork]()
    for name, work in steps.items():
        done = work.parts > 0 and work.reused == work.parts
        rows.append(row(words(name), [work], [] if done else [work]))
        fresh += [] if done else [work]
    totals = [row("This run", fresh, fresh)]
    if len(fresh) < len(steps):
        totals.insert(0, row("Everything", [*steps.values()], []))
    shown = [title == "time" or any(cells) for title, *cells in zip(_COST, *rows, strict=True)]
    return b.Table(
        dict(compress(_COST.items(), shown)),
        [[*compress(cells, shown)] for cells in rows],
        totals=[[*compress(cells, shown)] for cells in totals],
    )


def _flat(artifacts: Any, name: str = "") -> list[tuple[str, str]]:
    """Names and URIs; of a list the first one, and how many there are."""
    if isinstance(artifacts, Mapping):
        found = [_flat(value, f"{name} {key}".strip()) for key, value in artifacts.items()]
        return [pair for pairs in found for pair in pairs]
    if isinstance(artifacts, list):
        more = f", the first of {len(artifacts)}" if len(artifacts) > 1 else ""
        return [(name + more, artifacts[0])] if artifacts else []
    return [] if artifacts is None else [(name, str(artifacts))]
