"""What a selection chooses from: token parts, their scores, and the rows that are not eligible."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.pipelines.context import Context
from stillhouse.pipelines.scores import Scores
from stillhouse.pipelines.tokens import Tokenised
from stillhouse.selection.ranking import RankedPart, Rule, scorers_read
from stillhouse.spec import DataSource, SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tasks import UnitFile

_PRIOR_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pool as a selection sees it."""

    tokens: Manifest
    files: list[tuple[UnitFile, ...]]
    """Raw files of each part's unit."""
    source: DataSource
    sources: list[str]
    """Labels in the pool, sorted; known only where shares are asked for."""
    scores: Mapping[str, Scores]
    contamination: Scores | None
    """None where contaminated rows are allowed."""
    prior_rows: Mapping[str, NDArray[np.int64]]
    """Rows that the prior was trained on, by the sha256 of their token part."""
    prior_model: str
    """Fingerprint of the prior."""
    exclude_prior_rows: bool

    def ranked(self, store: Store, spec: SelectSpec, rule: Rule) -> list[RankedPart]:
        """Every part under a rule, with the losses of prior and conditional for the record."""
        return [
            RankedPart(
                store=store,
                tokens=part,
                scores={
                    name: self.scores[name].paths[index] for name in scorers_read(rule, self.scores)
                },
                contamination=self.contamination.paths[index] if self.contamination else None,
                prior_rows=self.prior_rows.get(part.sha256),
                exclude_prior_rows=self.exclude_prior_rows,
                rule=rule,
                grain=spec.selection.grain,
                seed=spec.selection.seed,
            )
            for index, part in enumerate(self.tokens.parts)
        ]


def candidates_of(
    ctx: Context,
    spec: SelectSpec,
    pool: Tokenised,
    scores: Mapping[str, Scores],
    contamination: Scores | None,
    prior: str,
    prior_rows: Mapping[str, NDArray[np.int64]],
    sources: list[str],
) -> Candidates:
    """Join what was made."""
    tokens = pool.manifest
    return Candidates(
        tokens=tokens,
        files=pool.files,
        source=spec.pool,
        sources=sources,
        scores=scores,
        contamination=contamination,
        prior_rows=prior_rows,
        prior_model=prior,
        exclude_prior_rows=excludes_prior_rows(spec, tokens, sum(map(len, prior_rows.values()))),
    )


def excludes_prior_rows(spec: SelectSpec, tokens: Manifest, num_rows: int) -> bool:
    """`exclude_prior_rows`; `auto` excludes them where they are above 2 % of the pool."""
    setting = spec.selection.exclude_prior_rows
    return num_rows / tokens.num_rows > _PRIOR_SHARE if setting == "auto" else setting
