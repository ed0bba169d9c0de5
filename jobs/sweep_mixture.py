"""A sweep over mixture weights: which mixtures its proxy runs have, and what they predict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stillhouse.report.blocks as b
from stillhouse.errors import SpecError
from stillhouse.jobs.sweep_outcome import Outcome
from stillhouse.jobs.sweep_spec import SweepSpec, Value
from stillhouse.mixing.proxies import Fit, draw_mixtures, fit_mixture, natural_shares, share_limits
from stillhouse.report.formatting import decimals, number_of
from stillhouse.training.spec import TrainSpec

_LEAST_CORRELATION = 0.5
_EDGE = 0.005
OPTIMUM_RUNS = 3
"""Runs that are not drawn: of equal shares, of natural ones, and of the predicted optimum."""


class Proxies:
    """The mixtures of a sweep's proxy runs.

    The first run has equal shares; its result tells how many tokens the data sets have.

    Attributes:
        names: of the data sets.
        natural: their shares of all tokens, [K].
        limits: their largest shares in the training that the weights are for, [K].

    Raises:
        SpecError: all data are too few for that training.
    """

    def __init__(self, spec: SweepSpec, first: Mapping[str, Any]) -> None:
        settings = spec.sweep.mixture
        assert settings is not None
        self._settings, self._sweep, train = settings, spec.sweep, first["train"]
        sets, whole = train["data"], train["num_tokens"]
        self.names = [one["name"] for one in sets]
        self._num_tokens = [round(whole * one["drawn"] / one["epochs"]) for one in sets]
        self._training_tokens = settings.num_tokens or whole
        self.natural = natural_shares(self._num_tokens)
        self.limits = share_limits(self._num_tokens, self._training_tokens, settings.max_epochs)
        self._concentration = settings.concentration or 2.0 * len(sets)

    def drawn(self) -> list[dict[str, Value]]:
        """The values of the natural mixture and of those that are drawn around it."""
        rng = np.random.default_rng(self._sweep.seed)
        count = (self._sweep.max_runs or 0) - OPTIMUM_RUNS
        mixtures = draw_mixtures(self.natural, count, self._concentration, rng)
        return [values_of(one) for one in (self.natural, *mixtures)]

    def at_edge(self, shares: Sequence[float], tried: Sequence[Mapping[str, Value]]) -> list[str]:
        """Data sets whose share is the largest that a run had, though their limit is higher."""
        most = np.array([shares_in(values) for values in tried]).max(axis=0)
        edge = (np.array(shares) > most - _EDGE) & (most < self.limits)
        return [name for name, at in zip(self.names, edge, strict=True) if at]

    def fit(self, measured: Sequence[tuple[Mapping[str, Value], float]]) -> Fit:
        """The regression of the metric on the shares.

        Raises:
            SpecError: too few runs have a result.
        """
        least = len(self.names) + 2
        if len(measured) < least:
            raise SpecError(
                f"`sweep.mixture`: {number_of(len(measured), 'run')} with a result, where a "
                f"regression on {len(self.names)} shares needs {least}: raise "
                "`sweep.max_runs`, or see why the others failed"
            )
        return fit_mixture(
            np.array([shares_in(values) for values, _ in measured]),
            np.array([metric for _, metric in measured]),
            self.natural,
            self.limits,
            regression=self._settings.regression,
            concentration=self._concentration,
            smallest=self._sweep.mode == "min",
            seed=self._sweep.seed,
        )

    def found(self, fit: Fit, runs: Mapping[str, Outcome], edge: Sequence[str]) -> "FoundMixture":
        """What the sweep found; the second of `runs` has natural shares, the last the optimum."""
        epochs = [
            share * self._training_tokens / tokens
            for share, tokens in zip(fit.shares, self._num_tokens, strict=True)
        ]
        natural, optimum = [*runs.values()][1], [*runs.values()][-1]
        sets = [
            {"name": name, "num_tokens": tokens, "natural": share, "weight": weight, "epochs": seen}
            for name, tokens, share, weight, seen in zip(
                self.names, self._num_tokens, self.natural.tolist(), fit.shares, epochs, strict=True
            )
        ]
        proxies = [name for name, one in [*runs.items()][:-1] if one.metric is not None]
        crossed = dict(zip(proxies, fit.crossed, strict=True))
        return FoundMixture(self._sweep.metric, fit, sets, crossed, natural, optimum, [*edge])


@dataclass(frozen=True, slots=True)
class FoundMixture:
    """The weights that a sweep found.

    Attributes:
        metric: its path.
        data: of each data set `name`, `num_tokens`, `natural` share, `weight`, `epochs`.
        crossed: by variant the metric that the others predict.
        natural: the run of the natural mixture.
        optimum: the run with the weights.
        edge: data sets whose share is the largest that a run had.
    """

    metric: str
    fit: Fit
    data: list[dict[str, Any]]
    crossed: dict[str, float]
    natural: Outcome
    optimum: Outcome
    edge: list[str]

    def numbers(self) -> dict[str, Any]:
        """`sweep.mixture` of `run --json`."""
        return {
            "data": self.data,
            "predicted": self.fit.predicted,
            "measured": self.optimum.metric,
            "measured_natural": self.natural.metric,
            "test": self.optimum.test,
            "test_natural": self.natural.test,
            "rank_correlation": self.fit.rank_correlation,
        }

    def warnings(self) -> list[b.Warn]:
        """Reasons not to believe in the weights."""
        correlation = self.fit.rank_correlation
        found = [
            b.Warn(
                f"`{name}`: no run had a larger share than its weight",
                "A larger one may be better: lower `sweep.mixture.concentration`, to draw mixtures "
                "further from the natural one.",
            )
            for name in self.edge
        ]
        if correlation is not None and correlation >= _LEAST_CORRELATION:
            return found
        shown = "none" if correlation is None else f"{correlation:.2f}"
        return [
            *found,
            b.Warn(
                f"The shares hardly predict `{self.metric}`: rank correlation {shown}",
                "The weights are little better than a guess: raise `sweep.max_runs`, train the "
                "proxies for longer, or take the natural mixture.",
            ),
        ]

    def tiles(self) -> list[b.Fact]:
        """How well the shares predict the metric, and what it is."""
        correlation = self.fit.rank_correlation
        facts = [
            b.Fact("Rank correlation", "none" if correlation is None else f"{correlation:.2f}",
                   "of predicted and measured, each run predicted from the others", main=True),
            b.Fact("Predicted", decimals(self.fit.predicted, 4), "of these weights"),
        ]  # fmt: skip
        for name, run in (("Measured", self.optimum), ("Natural mixture", self.natural)):
            if run.metric is not None:
                tested = "" if run.test is None else f"; test {decimals(run.test, 4)}"
                facts.append(b.Fact(name, decimals(run.metric, 4), f"of a small run{tested}"))
        return facts

    def section(self, measured: Mapping[str, float]) -> b.Section:
        """The weights, and each run's metric beside what others predict."""
        columns = {"Data": "text", "tokens": "compact", "natural": "percent", "weight": "percent"}
        columns |= {"epochs": "decimals2"}
        rows: list[list[b.Cell]] = [
            [one["name"], one["num_tokens"], one["natural"], one["weight"], one["epochs"]]
            for one in self.data
        ]
        pairs: list[list[b.Cell]] = [
            [name, measured[name], predicted] for name, predicted in self.crossed.items()
        ]
        both = {"variant": "text", "measured": "decimals4", "predicted": "decimals4"}
        crossed = b.Table(both, pairs, style="short")
        title = f"{len(pairs)} runs, each predicted from others"
        blocks: list[b.Block] = [
            b.Table(columns, rows, "Weights that the proxy runs predict to be best", terminal=True),
            b.Group([crossed], title),
        ]
        return b.Section("mixture", "Mixture", blocks)


def equal_shares(spec: SweepSpec) -> dict[str, Value]:
    """The values of the first proxy run."""
    assert isinstance(spec.of, TrainSpec)
    count = len(spec.of.datasets)
    return values_of(np.full(count, 1 / count))


def values_of(shares: Sequence[float] | NDArray[np.float64]) -> dict[str, Value]:
    """A mixture as values of the spec's keys."""
    return {f"data.{i}.weight": round(float(share), 6) for i, share in enumerate(shares)}


def shares_in(values: Mapping[str, Value]) -> NDArray[np.float64]:
    """The inverse of `values_of`, of sum 1."""
    weights = np.array([*values.values()], np.float64)
    return weights / weights.sum()
