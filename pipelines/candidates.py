"""What a selection chooses from: token parts, their scores, and the rows that are not eligible."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stillhouse.data_settings import PoolSource
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.scores import Scores
from stillhouse.pipelines.steps import run_tasks
from stillhouse.pipelines.tokens import Tokenised, TokenizerRef
from stillhouse.selection.quotas import check_others, check_shares, named_shares
from stillhouse.selection.ranking import RankedPart, scorers_read
from stillhouse.selection.rules import NamedRule
from stillhouse.selection.sources import LabelCounts, Sources
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import Grain
from stillhouse.text.tasks import UnitFile

_PRIOR_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Candidates:
    """The pool as a selection sees it."""

    tokens: Manifest
    files: list[tuple[UnitFile, ...]]
    """Raw files of each part's unit."""
    source: PoolSource
    tokenizer: TokenizerRef
    sources: "PoolSources"
    scores: Mapping[str, Scores]
    contamination: Scores | None
    """None where contaminated rows are allowed."""
    prior_rows: Mapping[str, NDArray[np.int64]]
    """Rows that the prior was trained on, by the sha256 of their token part."""
    prior_model: str
    """Fingerprint of the prior."""
    exclude_prior_rows: bool

    def ranked(self, store: Store, spec: SelectSpec, rule: NamedRule) -> list[RankedPart]:
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
    sources: "PoolSources",
    tokenizer: TokenizerRef,
) -> Candidates:
    """Join what was made."""
    tokens = pool.manifest
    return Candidates(
        tokens=tokens,
        files=pool.files,
        source=spec.pool,
        tokenizer=tokenizer,
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


class PoolSources:
    """The pool's sources: counted by the first that needs them, once for the job's selections."""

    def __init__(self, ctx: Context, spec: SelectSpec, tokens: Manifest) -> None:
        self._ctx, self._asked, self._tokens = ctx, spec.selection, tokens
        self._found: Sources | None = None

    def get(self) -> Sources:
        """Those that are counted one by one: the largest, and those that a share names."""
        if self._found is None:
            named = frozenset(_named(self._asked.max_share) | _named(self._asked.min_share))
            count = partial(count_labels, self._asked.grain, named)
            units = self._tokens.inputs["units"]
            items = [self._ctx.store.path(u["labels"]) for u in units if u["labels"] is not None]
            counts = LabelCounts(named)
            for found in run_tasks(self._ctx, count, items):
                counts.add(
                    ((label, *both) for label, both in found.counts.items()), found.forgotten_rows
                )
            self._found = counts.choose()
        return self._found

    def check_shares(self, num_rows: int) -> None:
        """Refuse shares that cannot be held in a selection of so many rows, before any scoring.

        Raises:
            BudgetError: a share of a source that the pool does not have, shares that its rows do
                not allow, or one for all sources that is too small for those that are counted
                together.
        """
        asked = self._asked
        if self._ctx.dry:
            return  # only a cut needs them, and a dry run makes none
        sources = self.get()
        shares = named_shares(asked.max_share, asked.min_share, sources)
        there = [*sources.num_rows, self._tokens.num_rows - sum(sources.num_rows)]
        check_shares(num_rows, there[: len(sources.labels)], sources.labels, **shares)
        check_others(asked.max_share, num_rows, sources)


def _named(shares: object) -> set[str]:
    return set(shares) if isinstance(shares, dict) else set()


def count_labels(grain: Grain, named: frozenset[str], uri: str) -> LabelCounts:
    """The labels of a unit's token parts; a row counts for the source that owns most of it."""
    table = read_table(uri, ["label", "tokens", grain])
    found = LabelCounts(named)
    found.add(zip(*table.to_pydict().values(), strict=True))
    return found
