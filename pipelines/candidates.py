"""What a selection chooses from: token parts, their scores, and the rows that are not eligible."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import BudgetError
from stillhouse.pipelines.context import Context, run_tasks
from stillhouse.pipelines.scores import Scores
from stillhouse.pipelines.takedown import Takedown
from stillhouse.pipelines.tokens import Tokenised, TokenizerRef
from stillhouse.selection.quotas import (
    LabelCounts,
    Sources,
    check_others,
    check_shares,
    named_shares,
)
from stillhouse.selection.ranking import RankedPart, scorers_read
from stillhouse.selection.rules import NamedRule
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import Grain

_PRIOR_SHARE = 0.02


class PackedPool:
    """The pool as a selection sees it before it is scored: its sources, and how much to keep."""

    def __init__(self, ctx: Context, spec: SelectSpec, pool: Tokenised) -> None:
        self.ctx, self.settings = ctx, spec.selection
        self.tokens, self.files = pool.manifest, pool.files

    @cached_property
    def sources(self) -> Sources:
        """The sources that are counted one by one; counted on workers when first asked for."""
        settings = self.settings
        named = frozenset({*_names(settings.max_share), *_names(settings.min_share)})
        count = partial(count_labels, settings.grain, named)
        units = self.tokens.inputs["units"]
        uris = [self.ctx.store.path(unit["labels"]) for unit in units if unit["labels"] is not None]
        counts = LabelCounts(named)
        for part in run_tasks(self.ctx, count, uris):
            rows = ((label, *both) for label, both in part.counts.items())
            counts.add(rows, part.forgotten_rows)
        return counts.choose()

    @property
    def has_shares(self) -> bool:
        return self.settings.max_share is not None or self.settings.min_share is not None

    def excludes_prior_rows(self, num_rows: int) -> bool:
        """`exclude_prior_rows`; `auto` excludes them where they are above 2 % of the pool."""
        setting = self.settings.exclude_prior_rows
        return num_rows / self.tokens.num_rows > _PRIOR_SHARE if setting == "auto" else setting

    def check_size(self, num_prior_rows: int = 0) -> None:
        """Refuse a selection that is empty or too large, before the pool is scored.

        `num_prior_rows`: rows that the prior is trained on.

        Raises:
            BudgetError: with the size asked for and the size of the pool.
        """
        settings, tokens = self.settings, self.tokens
        if settings.min_score is not None or settings.threshold_from is not None:
            return
        if settings.grain == "documents":
            if self.token_budget() > tokens.num_tokens:
                raise BudgetError(
                    f"the selection is larger than the pool: {settings.num_tokens:,} tokens asked, "
                    f"{tokens.num_tokens:,} there (`selection.num_tokens`)"
                )
            return
        count = self.row_budget()
        left = tokens.num_rows - num_prior_rows
        if self.excludes_prior_rows(num_prior_rows) and count > left:
            raise BudgetError(
                f"{count:,} sequences asked, but the prior was trained on {num_prior_rows:,} of "
                f"the pool's {tokens.num_rows:,} and they are excluded, {left:,} are left: keep "
                "less, or set `selection.exclude_prior_rows: false`"
            )

    def check_shares(self) -> None:
        """Refuse shares that cannot hold, before the pool is scored.

        Raises:
            BudgetError: a share of a source that the pool does not have, or shares that its rows
                do not allow.
        """
        if not self.has_shares or self.ctx.dry:  # a dry run cuts nothing, and may not count
            return
        settings, sources, count = self.settings, self.sources, self.row_budget()
        shares = named_shares(settings.max_share, settings.min_share, sources)
        num_rows = [*sources.num_rows, self.tokens.num_rows - sum(sources.num_rows)]
        check_shares(count, num_rows[: len(sources.labels)], sources.labels, **shares)
        check_others(settings.max_share, count, sources)

    def row_budget(self) -> int:
        """Sequences to keep, of all that the pool has: tau is their ratio (Algorithm 1)."""
        settings, total = self.settings, self.tokens.num_rows
        if settings.tau is not None:
            count = int(total / settings.tau)
        elif settings.fraction is not None:
            count = int(total * settings.fraction)
        else:
            assert settings.num_tokens is not None
            count = settings.num_tokens // self.tokens.settings["sequence_length"]
        if count < 1:
            raise BudgetError(f"the selection would be empty: the pool has {total:,} sequences")
        if count > total:
            raise BudgetError(
                f"the selection is larger than the pool: {count:,} sequences asked, {total:,} "
                "there (`selection.num_tokens`)"
            )
        return count

    def token_budget(self) -> int:
        settings = self.settings
        if settings.num_tokens is not None:
            return settings.num_tokens
        share = 1 / settings.tau if settings.tau is not None else settings.fraction
        assert share is not None
        return int(self.tokens.num_tokens * share)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The scored pool.

    Attributes:
        contamination: None where contaminated rows are allowed.
        benchmarks: the same for benchmarks; None without any.
        takedown: None without lists.
        prior_rows: rows that the prior was trained on, by the sha256 of their token part.
        prior_model: folder of the prior in the store; empty without one.
    """

    spec: SelectSpec
    pool: PackedPool
    tokenizer: TokenizerRef
    scores: Mapping[str, Scores]
    contamination: Scores | None
    benchmarks: Scores | None
    takedown: Takedown | None
    prior_rows: Mapping[str, NDArray[np.int64]]
    prior_model: str

    @property
    def tokens(self) -> Manifest:
        return self.pool.tokens

    @property
    def exclude_prior_rows(self) -> bool:
        return self.pool.excludes_prior_rows(sum(map(len, self.prior_rows.values())))

    def ranked(self, rule: NamedRule) -> list[RankedPart]:
        """Every part under a rule, with the losses of prior and conditional for the record."""
        exclude_prior_rows = self.exclude_prior_rows
        names = scorers_read(rule, self.scores)
        paths = {name: self.scores[name].paths for name in names}
        flags = self.contamination.paths if self.contamination else None
        shared = self.benchmarks.paths if self.benchmarks else None
        taken = self.takedown.rows if self.takedown else {}
        return [
            RankedPart(
                store=self.pool.ctx.store,
                tokens=part,
                scores={name: paths[name][index] for name in names},
                contamination=flags[index] if flags else None,
                prior_rows=self.prior_rows.get(part.sha256),
                exclude_prior_rows=exclude_prior_rows,
                rule=rule,
                grain=self.spec.selection.grain,
                seed=self.spec.selection.seed,
                benchmarks=shared[index] if shared else None,
                taken_down=taken.get(part.sha256),
            )
            for index, part in enumerate(self.tokens.parts)
        ]


def _names(shares: object) -> list[str]:
    return list(shares) if isinstance(shares, dict) else []


def count_labels(grain: Grain, named: frozenset[str], uri: str) -> LabelCounts:
    """The labels of a unit's token parts; a row counts for the source that owns most of it."""
    table = read_table(uri, ["label", "tokens", grain])
    counts = LabelCounts(named)
    counts.add(zip(*table.to_pydict().values(), strict=True))
    return counts
