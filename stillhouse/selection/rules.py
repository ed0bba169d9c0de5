"""Ranking rules: what a row is worth, from what the scorers said of it. Larger is better.

A spec names one for the selection (`selection.rule`) and others to compare with (`train.controls`),
by a short name or as `my_package.module:MyRule`. A user's class is the same thing as ours: no
arguments, `scorers` and `values`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import ScorerError, SpecError
from stillhouse.own_code import find_class, literal_of
from stillhouse.selection.baselines import gumbel
from stillhouse.selection.color import color_score
from stillhouse.selection.own import OwnCode, failed_in
from stillhouse.text.duplicates import keyed_uniform

Values: TypeAlias = NDArray[np.float32]
"""One number a row: float32 [n]."""
SCORERS = ("prior", "conditional", "down", "own", "dsir")
"""What a rule may read: mean losses under three models in nats a token, a user's scorer, DSIR's
log weights."""


@dataclass(frozen=True, slots=True)
class RankedRows:
    """The n rows that are ranked: the sequences, or the documents, of one part.

    Attributes:
        num_tokens: int64 [n].
        keys: uint64 [n], by content: for draws that are the same everywhere.
        seed: `selection.seed`, for such draws.
    """

    num_tokens: NDArray[np.int64]
    keys: NDArray[np.uint64]
    seed: int


class RankingRule(Protocol):
    """What a class has to have to be a rule."""

    @property
    def scorers(self) -> Sequence[str]:
        """Names among `SCORERS`: those whose values it reads. A class attribute, written out."""
        ...

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """Values [n], larger is better; NaN leaves a row out.

        Args:
            scores: float32 [n] of each scorer that the rule names.
            rows: what is ranked.
        """
        ...


class Color:
    """CoLoR-Filter: how much the loss drops from the prior to the conditional."""

    scorers = ("prior", "conditional")

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """S_prior - S_conditional."""
        return color_score(scores["prior"], scores["conditional"])


class OwnValue:
    """What a user's scorer says."""

    scorers = ("own",)

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """Its values."""
        return scores["own"].copy()


class RandomDraw:
    """Any rows."""

    scorers = ()

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """Uniform, by content and seed."""
        return keyed_uniform(rows.keys, rows.seed).astype(np.float32)


class ConditionalOnly:
    """What the conditional finds likely."""

    scorers = ("conditional",)

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """-S_conditional."""
        return -scores["conditional"]


class RhoDown:
    """RHO-LOSS (Mindermann et al. 2022), with a model trained on the target alone."""

    scorers = ("prior", "down")

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """S_prior - S_down."""
        return color_score(scores["prior"], scores["down"])


class DsirDraw:
    """DSIR (Xie et al. 2023): a draw by importance weights, without replacement."""

    scorers = ("dsir",)

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """Log weights with Gumbel noise."""
        return scores["dsir"] + gumbel(rows.keys, rows.seed)


RULES: dict[str, RankingRule] = {
    "color": Color(),
    "own": OwnValue(),
    "random": RandomDraw(),
    "conditional_only": ConditionalOnly(),
    "dsir": DsirDraw(),
    "rho_down": RhoDown(),
}


@dataclass(frozen=True, slots=True)
class NamedRule:
    """A rule by its name in the spec; `code` of one that is not ours."""

    name: str
    scorers: tuple[str, ...]
    code: OwnCode | None = None

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """As `RankingRule.values`.

        Raises:
            ScorerError: what a user's rule raised, or values that are not one number a row.
        """
        if self.code is None:
            return RULES[self.name].values(scores, rows)
        rule: RankingRule = self.code.build({})
        try:
            found = np.asarray(rule.values(scores, rows), np.float32)
        except Exception as error:
            raise failed_in(self.code, "failed in `values`", error) from error
        if found.shape != rows.keys.shape:
            raise ScorerError(
                f"rule {self.name}: `values` returned shape {found.shape} for {len(rows.keys)} "
                "rows: return one number for each"
            )
        return found


def find_rule(place: str, name: str) -> NamedRule:
    """The rule of this name; code of the user's is found and looked at, not run.

    Args:
        place: key in the spec, for messages.
        name: as there.

    Raises:
        SpecError: no such rule, or one that reads a scorer which nobody knows.
    """
    if name in RULES:
        return NamedRule(name, tuple(RULES[name].scorers))
    found, node = find_class(f"{place}: {name}", name, ("values",))
    scorers = literal_of(node, "scorers")
    if not isinstance(scorers, tuple | list) or not {*scorers} <= {*SCORERS}:
        raise SpecError(
            f"`{place}: {name}`: the class needs `scorers = (...)`, with names among "
            f"{', '.join(SCORERS)}"
        )
    return NamedRule(name, tuple(scorers), OwnCode(name, found.files))
