"""Ranking rules: the value of a row, from the scores that it got. Larger is better.

A spec names one for the selection (`selection.rule`) and others to compare with (`train.controls`),
by a short name or as `my_package.module:MyRule`. A user's class looks like the built-in ones: no
arguments, `scorers` and `values`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.custom_code import CustomCode, find_class
from stillhouse.errors import CustomCodeError, SpecError
from stillhouse.selection.color import color_score
from stillhouse.selection.dsir import gumbel
from stillhouse.spec import SelectSpec
from stillhouse.text.duplicates import keyed_uniform

Values: TypeAlias = NDArray[np.float32]
"""One number a row: float32 [n]."""
SCORERS = ("prior", "conditional", "down", "own", "dsir")
"""What a rule may read: mean losses under three models in nats per token, the values of a user's
scorer, DSIR's log weights."""


@dataclass(frozen=True, slots=True)
class RankedRows:
    """The n rows that are ranked: the sequences, or the documents, of one part.

    Attributes:
        num_tokens: int64 [n].
        keys: uint64 [n], a hash of the part's content and the row: for reproducible draws.
        seed: `selection.seed`, for such draws.
    """

    num_tokens: NDArray[np.int64]
    keys: NDArray[np.uint64]
    seed: int


class RankingRule(Protocol):
    """What a ranking rule has."""

    @property
    def scorers(self) -> Sequence[str]:
        """Names from `SCORERS` whose values it reads; a class attribute with a literal value."""
        ...

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """Values [n], larger is better; NaN excludes a row.

        Args:
            scores: float32 [n] of each scorer that the rule names.
        """
        ...


class Color:
    """CoLoR-Filter: S_prior - S_conditional."""

    scorers = ("prior", "conditional")

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        return color_score(scores["prior"], scores["conditional"])


class OwnValue:
    """The values of a user's scorer."""

    scorers = ("own",)

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        return scores["own"].copy()


class RandomDraw:
    """Uniform, by content and seed."""

    scorers = ()

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        return keyed_uniform(rows.keys, rows.seed).astype(np.float32)


class ConditionalOnly:
    """-S_conditional: what the conditional finds likely."""

    scorers = ("conditional",)

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        return -scores["conditional"]


class RhoDown:
    """RHO-LOSS (Mindermann et al. 2022): S_prior - S_down, which saw the target alone."""

    scorers = ("prior", "down")

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        return color_score(scores["prior"], scores["down"])


class DsirDraw:
    """DSIR (Xie et al. 2023): log weights with Gumbel noise, a draw without replacement."""

    scorers = ("dsir",)

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
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
    """A rule by its name in the spec; `code` of a user's rule."""

    name: str
    scorers: tuple[str, ...]
    code: CustomCode | None = None

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """As `RankingRule.values`.

        Raises:
            CustomCodeError: a rule of the user raised, or did not return one number for each row.
        """
        if self.code is None:
            return RULES[self.name].values(scores, rows)
        rule: RankingRule = self.code.build({})
        try:
            found = np.asarray(rule.values(scores, rows), np.float32)
        except Exception as error:
            raise self.code.failed("failed in `values`", error) from error
        if found.shape != rows.keys.shape:
            raise CustomCodeError(
                f"rule {self.name}: `values` returned shape {found.shape} for {len(rows.keys)} "
                "rows: return one number for each"
            )
        return found


def find_rule(place: str, name: str) -> NamedRule:
    """The rule of this name; a user's code is found and checked without running it.

    Args:
        place: key in the spec, for messages.
        name: its value.

    Raises:
        SpecError: no such rule, or a rule that reads an unknown scorer.
    """
    if name in RULES:
        return NamedRule(name, tuple(RULES[name].scorers))
    if ":" not in name:
        raise SpecError(
            f"`{place}: {name}`: no such rule; there are {', '.join(RULES)}, and your own as "
            "`my_package.module:MyRule`"
        )
    code = find_class(place, name, ("values",))
    scorers = code.literal("scorers")
    if not isinstance(scorers, tuple | list) or not {*scorers} <= {*SCORERS}:
        raise SpecError(
            f"`{place}: {name}`: the class needs `scorers = (...)`, with names among "
            f"{', '.join(SCORERS)}"
        )
    return NamedRule(name, tuple(scorers), code)


def rules_of(spec: SelectSpec) -> list[NamedRule]:
    """The rule of the selection, then those of the controls.

    Raises:
        SpecError: no such rule, one that reads a scorer that the job does not have, or one rule
            twice.
    """
    controls = spec.train.controls if spec.train else []
    rules = [find_rule("selection.rule", spec.rule)]
    rules += [find_rule("train.controls", name) for name in controls]
    absent = {"own"} if spec.scorer is None else {"prior", "conditional", "down"}
    for i, rule in enumerate(rules):
        if rule in rules[:i]:
            raise SpecError(
                f"`train.controls: {rule.name}`: the selection or another control has this rule"
            )
        if missing := sorted(absent & {*rule.scorers}):
            raise SpecError(
                f"the rule `{rule.name}` reads `{missing[0]}`, which this job does not have: "
                "give `prior` and `conditional`, or a `scorer`, as the rule needs"
            )
        if "dsir" in rule.scorers and spec.selection.grain == "documents":
            raise SpecError(
                f"the rule `{rule.name}` ranks sequences: use `selection.grain: sequences`"
            )
    return rules
