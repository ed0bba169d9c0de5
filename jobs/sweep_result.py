"""The result of a sweep: that of the chosen variant, and how the variants compare."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.jobs import process
from stillhouse.jobs.sweep_mixture import FoundMixture
from stillhouse.jobs.sweep_outcome import Outcome
from stillhouse.jobs.sweep_record import Decisions
from stillhouse.jobs.sweep_spec import SweepSpec, Value
from stillhouse.pipelines.context import Context, Listener, StepWork
from stillhouse.pipelines.results import assemble, cost_numbers
from stillhouse.report.formatting import decimals
from stillhouse.storage.artifact import Store

_OWN = {"status", "job", "run", "report", "artifacts", "work", "warnings", "cost", "published"}


_SEEN = (
    "The metric of the chosen variant was used to choose it: where variants are close, measure it "
    "again on data that were not looked at."
)
_UNSEEN = (
    "Variants were compared on validation data alone: a held-out loss is that of one half of the "
    "held-out documents. `Test` is the chosen variant's number on the other half, or on the test "
    "part, which nothing was chosen by."
)


class SweepReport:
    """Numbers and report of a sweep, of which at least one variant has a result."""

    def __init__(
        self,
        spec: SweepSpec,
        outcomes: Mapping[str, Outcome],
        mixture: FoundMixture | None = None,
    ) -> None:
        self._spec, self._sweep, self._outcomes = spec, spec.sweep, outcomes
        self._mixture = mixture
        found = {name: one.metric for name, one in outcomes.items() if one.metric is not None}
        self._found = found
        pick = min if self._sweep.mode == "min" else max
        self.best = pick(found, key=lambda name: found[name])

    def result(self, store: Store, run_uri: str, decisions: Decisions) -> b.Result:
        """The result; its run is the sweep's own."""
        sweep, outcomes = self._sweep, self._outcomes
        best = outcomes[self.best]
        assert best.made is not None
        chosen = best.made.result
        numbers = {key: value for key, value in chosen.items() if key not in _OWN}
        numbers["sweep"] = {
            "run": run_uri,
            "metric": sweep.metric,
            "mode": sweep.mode,
            "variants": [one.numbers() for one in outcomes.values()],
            "chosen": best.numbers() | {"test": best.test},
        }
        if self._mixture is not None:
            numbers["sweep"]["mixture"] = self._mixture.numbers()
        ctx = Context(store, self._spec.compute, Listener())
        ctx.work = {
            name: one.work or StepWork(parts=1)
            for name, one in outcomes.items()
            if one.run is not None
        }
        charts = [*self._charts(), *self._learning(decisions.evaluations)]
        return assemble(
            ctx,
            self._spec,
            chosen["job"],
            run_uri,
            title=f"{sweep.metric} over {', '.join(sweep.over) or 'mixtures'}",
            artifacts=chosen["artifacts"] | ({} if self._mixture is None else {"weights": run_uri}),
            numbers=numbers | {"cost": cost_numbers(ctx.work)},
            warnings=self._warnings(),
            lead=[b.Facts(self._tiles(), terminal=True)],
            sections=[
                *([] if self._mixture is None else [self._mixture.section(self._found)]),
                b.Section("variants", "Variants", charts),
            ],
            footer=_UNSEEN if best.test is not None else _SEEN,
        )

    def _warnings(self) -> b.Warnings:
        failed = [
            b.Warn(f"{dict(one.values)} failed", process.failure_text(one.error))
            for one in self._outcomes.values()
            if one.error is not None
        ]
        edges = [
            b.Warn(
                f"`{key}`: the best value is at the edge of those tried",
                "A better one may lie outside: widen `sweep.over`.",
            )
            for key in self._sweep.over
            if self._at_edge(key)
        ]
        return b.Warnings(
            [*failed, *edges, *([] if self._mixture is None else self._mixture.warnings())],
            "Failures, and best values at the edge, were looked for.",
        )

    def _at_edge(self, key: str) -> bool:
        ran = ("done", "reused", "stopped")
        tried = [one.values[key] for one in self._outcomes.values() if one.status in ran]
        numbers = {value for value in tried if isinstance(value, int | float)}
        if len(numbers) < 3:
            return False
        return self._outcomes[self.best].values[key] in (min(numbers), max(numbers))

    def _tiles(self) -> list[b.Fact]:
        best = self._outcomes[self.best]
        values = ", ".join(f"{key} {_short(value)}" for key, value in best.values.items())
        count = f"{len(self._found)} of {len(self._outcomes)} ran to the end"
        mixture = [] if self._mixture is None else self._mixture.tiles()
        tested = []
        if best.test is not None:
            note = "of the chosen variant, on what it was not chosen on"
            tested.append(b.Fact("Test", decimals(best.test, 4), note, main=True))
        return [
            *mixture,
            b.Fact(self._sweep.metric, decimals(self._found[self.best], 4), values, main=True),
            *tested,
            b.Fact("Variants", str(len(self._outcomes)), count),
        ]

    def _charts(self) -> Iterator[b.Block]:
        """A table, and a curve for each key whose values are numbers."""
        outcomes, metric = self._outcomes, self._sweep.metric
        sign = 1 if self._sweep.mode == "min" else -1
        order = sorted(outcomes, key=lambda name: sign * self._found.get(name, sign * math.inf))
        rows: list[list[b.Cell]] = [
            [
                name,
                _values(outcomes[name].values),
                self._found.get(name, outcomes[name].shown_status),
            ]
            for name in order
        ]
        keys = [*outcomes[self.best].values]
        columns = {"variant": "text", keys[0] if len(keys) == 1 else "values": "text"}
        columns[metric] = "decimals4"
        unseen = outcomes[self.best].test is not None
        caption = f"Best first, by `{metric}`{' on validation data' if unseen else ''}."
        if any(one.stopped_at is not None for one in outcomes.values()):
            caption += f" Evaluations are counted to {self._spec.num_evaluations}."
        yield b.Table(columns, rows, caption, main=self.best, terminal=True)
        for key in self._sweep.over:
            values = {name: outcomes[name].values[key] for name in self._found}
            points = [
                (float(value), self._found[name])
                for name, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ]
            if len({x for x, _ in points}) >= 3:
                curve = {metric: [sorted(points)]}
                yield b.Curves(f"By `{key}`", curve, metric, key, metric, settled_from=0.0)

    def _learning(self, evaluations: Sequence[Mapping[str, Any]]) -> Iterator[b.Block]:
        """The metric while the variants trained."""
        curves: dict[str, list[b.Points]] = {}
        for name, one in self._outcomes.items():
            run = (one.run or "").rsplit("/", 1)[-1]
            points = [(e["evaluation"], e["value"]) for e in evaluations if e["run"] == run]
            if points:
                curves[name] = [[(float(x), y) for x, y in points]]
        if curves:
            caption = "While the variants trained; those that end early were stopped"
            metric = self._sweep.metric
            yield b.Curves(caption, curves, self.best, "evaluation", metric)


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(values: Mapping[str, Value]) -> str:
    """`0.01`, or of several keys `train.learning_rate 0.01, train.global_batch 8`."""
    if len(values) == 1:
        return _short(*values.values())
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())
