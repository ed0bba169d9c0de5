"""What the results of all jobs have in common: numbers of the run, its cost, how to repeat it."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import compress
from statistics import fmean, stdev
from typing import Any

import stillhouse.report.blocks as b
from stillhouse import __version__
from stillhouse.operating_settings import PriceSettings
from stillhouse.pipelines.context import Context, StepWork
from stillhouse.report.formatting import num_bytes, words
from stillhouse.spec import JobSpec, Optimisation
from stillhouse.storage.filesystem import join
from stillhouse.storage.run_record import now

HELD = ("gpu_seconds", "cpu_seconds", "num_bytes")
"""What is paid for, as `StepWork` has it."""
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
    """A job's result: its own `numbers` and `sections` and those that all jobs have.

    `cost` follows the table of steps; `forward` is the paper's unit in FLOPs a token.
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
    if spec.prices is not None:
        common["price"] = price_numbers(ctx.work, spec.prices)
        cost = [_price(common["price"]), *cost]
    uris = [b.Fact(words(name), uri) for name, uri in _flat(artifacts)]
    versions = [b.Fact("stillhouse", __version__)]
    versions += [b.Fact(name, version(name)) for name in _LIBRARIES]
    repeat: list[b.Block] = [
        b.Group([b.Text(spec.to_yaml(), "code")], "The spec, with every default"),
        b.Group([b.Facts(uris, "list")], f"{len(uris)} artifacts"),
        b.Group([b.Facts(versions, "list")], "Environment"),
    ]
    page = [
        b.Section("lead", "", [*lead]),
        b.Section("health", "", [warnings]),
        *(section for section in sections if section.blocks),
        b.Section("cost", "What it cost", [_cost(ctx.work, forward), *cost]),
        b.Section("provenance", "How to repeat it", repeat),
    ]
    return b.Result(job, spec.name or title, now(), {**common, **numbers}, page, footer)


def price_numbers(work: Mapping[str, StepWork], prices: PriceSettings) -> dict[str, float]:
    """What this run's work costs, and a month of its parts in the store.

    `compute`, `storage_month`, and what they are of: `gpu_seconds`, `cpu_seconds`, `num_bytes`.
    Parts are tokens, scores, signals and the like; a model counts as four bytes a parameter.
    """
    held = {key: sum(getattr(step, key) for step in work.values()) for key in HELD}
    return {
        "compute": prices.of_compute(held["gpu_seconds"], held["cpu_seconds"]),
        "storage_month": held["num_bytes"] / 1e9 * prices.gb_month,
        **held,
    }


def _price(price: Mapping[str, float]) -> b.Block:
    hours = {"GPU": price["gpu_seconds"] / 3600, "CPU": price["cpu_seconds"] / 3600}
    used = " and ".join(f"{value:,.3g} {name} hours" for name, value in hours.items() if value)
    return b.Text(
        f"At the spec's `prices` the work of this run costs **{price['compute']:,.2f}** "
        f"({used or 'no work'}), and its parts in the store, {num_bytes(int(price['num_bytes']))}, "
        f"**{price['storage_month']:,.2f}** a month."
    )


def cost_numbers(work: Mapping[str, StepWork]) -> dict[str, Any]:
    """FLOPs and busy time by step."""
    return {
        "flops": {name: step.flops for name, step in work.items() if step.flops},
        "device_seconds": {name: round(step.device_seconds, 3) for name, step in work.items()},
    }


def heldout_halves(models: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """The last held-out losses of trained models' totals by half, their mean over the models; None
    without held-out text, or where it cannot be split.
    """
    found = [totals["evaluations"][-1]["halves"] for totals in models]
    if not all(found):
        return None
    return {name: fmean(halves[name]["nll"] for halves in found) for name in found[0]}


def mean_std(values: Sequence[float]) -> list[float | None]:
    """A table's cell of mean and sample standard deviation (None for a single value)."""
    return [fmean(values), stdev(values) if len(values) > 1 else None]


def plus_minus(values: Sequence[float], places: int = 3) -> str:
    """The same as text: `0.512 ± 0.003`."""
    mean, deviation = mean_std(values)
    return f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


def automatic(settings: Optimisation | None) -> bool:
    """Whether both learning rate and batch are `auto`."""
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
    """Work of each step, and the time that this run took; empty columns are left out."""
    most = max((step.flops for step in steps.values()), default=0) or 1

    def row(name: str, work: Sequence[StepWork], fresh: Sequence[StepWork]) -> list[b.Cell]:
        flops = sum(step.flops for step in work)
        share = flops / most if flops and len(work) == 1 else None
        return [
            name,
            [] if share is None else [None, share] if fresh else [share],
            sum(step.parts for step in work),
            sum(step.reused for step in work) or None,
            sum(step.tokens for step in work) or None,
            flops or None,
            sum(step.seconds for step in fresh) or None,
            sum(step.device_seconds for step in fresh) or None,
            flops / forward if forward and flops else None,
        ]

    rows, fresh = list[list[b.Cell]](), list[StepWork]()
    for name, step in steps.items():
        own = [] if step.parts > 0 and step.reused == step.parts else [step]
        rows.append(row(words(name), [step], own))
        fresh += own
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
    """Names and URIs; of a list its first URI, and its length in the name."""
    if isinstance(artifacts, Mapping):
        return [
            pair
            for key, value in artifacts.items()
            for pair in _flat(value, f"{name} {key}".strip())
        ]
    if isinstance(artifacts, list):
        more = f", the first of {len(artifacts)}" if len(artifacts) > 1 else ""
        return [(name + more, artifacts[0])] if artifacts else []
    return [] if artifacts is None else [(name, str(artifacts))]
