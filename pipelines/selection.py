"""The exact global cut over stored scores, and the selection's parts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from stillhouse.errors import BudgetError
from stillhouse.fingerprint import content_batches, fingerprint, sha256
from stillhouse.pipelines.candidates import Candidates
from stillhouse.pipelines.context import Context, Step, perform, run_tasks
from stillhouse.pipelines.given import find_input
from stillhouse.reading.readers import open_selection
from stillhouse.selection.budget import Cut, find_cut, find_weighted_cut, threshold_cut
from stillhouse.selection.ledger import LEDGER_SCHEMA, LOSS_SPAN, SCORE_SPAN, Tally, join_spans
from stillhouse.selection.quotas import QuotaCut, cut_to_json, find_quota_cut, named_shares
from stillhouse.selection.ranking import RULE_VERSION, PartRanks, Ranks, RankTask, scorers_read
from stillhouse.selection.rules import NamedRule
from stillhouse.selection.writing import Member, WriteTask, group_parts
from stillhouse.spec import SelectionSettings
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.layout import LAYOUT_VERSION, LEDGER, about
from stillhouse.storage.parquet import parquet_bytes
from stillhouse.text.records import used_keys

_RANKED_TOGETHER = 32
"""Parts whose rows are in one table, at most."""
_NOT_ELIGIBLE = {
    "contaminated": "share 13 words with the held-out target (give another `target.heldout`, or "
    "set `selection.exclude_contaminated: false`) or a benchmark (`decontaminate`)",
    "prior row": "were trained on by the prior (`selection.exclude_prior_rows`)",
    "nan": "have no score (NaN)",
    "taken down": "hold a document that was taken down (`exclude`)",
}


@dataclass(frozen=True, slots=True)
class Selected:
    """A selection artifact."""

    manifest: Manifest

    @property
    def tally(self) -> Tally:
        return Tally.from_json(self.manifest.totals["tally"])

    @property
    def threshold(self) -> float:
        """Score of the worst kept row."""
        return float(self.manifest.totals["threshold"])


def select(ctx: Context, pool: Candidates, rule: NamedRule, size: int | None = None) -> Selected:
    """Rank, cut exactly, and write the kept rows.

    Args:
        size: of a control: rows to keep (tokens, where documents are chosen) instead of what the
            spec says.

    Raises:
        BudgetError: more asked than there is, or shares that cannot all hold.
    """
    return _Selecting(ctx, pool, rule, size).select()


@dataclass(frozen=True, slots=True)
class _Selecting:
    """One selection or control in the making."""

    ctx: Context
    pool: Candidates
    rule: NamedRule
    size: int | None

    @property
    def settings(self) -> SelectionSettings:
        return self.pool.spec.selection

    @property
    def keep_columns(self) -> list[str]:
        """Columns of the pool that rows carry: controls carry none."""
        return self.pool.spec.pool.keep_columns if self.size is None else []

    @property
    def with_text(self) -> bool:
        return self.size is None and self.settings.text and self.settings.grain == "sequences"

    def select(self) -> Selected:
        ctx, name = self.ctx, self._identity()
        found = ctx.store.find_manifest("selections", name)
        groups = found.totals["groups"] if found else 0
        step = "selection" if self.size is None else f"control {self.rule.name}"
        if found is not None or ctx.dry:
            with ctx.step(step, total=groups or 1, reused=groups):
                assert found is not None  # a dry step without one ends here
            return Selected(found)
        shared = self.size is None and self.pool.pool.has_shares
        sources = self.pool.pool.sources if shared else None
        ranking = "rank" if self.size is None else f"rank {self.rule.name}"
        ranked = self.pool.ranked(self.rule)
        batches = content_batches([part.tokens.sha256 for part in ranked], _RANKED_TOGETHER)
        together = [tuple(ranked[batch.start : batch.stop]) for batch in batches]
        receipts = perform(ctx, Step(ranking, [RankTask(parts, sources) for parts in together]))
        ranks = _Ranking(ctx.store, receipts)
        try:
            among_tables = self._cut(ranks.tables)
        except BudgetError as error:
            raise _too_few(ranks.parts, error) from None
        kept, cut = self._num_kept(ranks, among_tables), among_tables.among(ranks.rows)
        tasks = self._write_tasks(name, ranks, kept, cut)
        return Selected(self._finish(name, cut, perform(ctx, Step(step, tasks))))

    def _identity(self) -> str:
        """Everything that decides which rows are kept and in which order."""
        pool, store = self.pool, self.ctx.store
        hidden = pool.prior_rows if pool.exclude_prior_rows else {}
        prior_rows = {sha: sha256(rows.tobytes()) for sha, rows in hidden.items()}
        asked = self.settings.model_dump(exclude={"text", "rule"})
        if self.settings.threshold_from is not None:
            asked["threshold_from"] = _threshold(store, self.settings.threshold_from)
        uris = dict.fromkeys(file.uri for unit in pool.pool.files for file in unit)
        folders = [used_keys(uri, self.keep_columns) for uri in uris] if self.keep_columns else []
        carried = (self.keep_columns, self.with_text, *([folders] if any(folders) else []))
        shared = [pool.benchmarks.manifest.fingerprint] if pool.benchmarks else []
        taken = pool.takedown.digest if pool.takedown else None
        return fingerprint(
            [
                "selection",
                RULE_VERSION,
                LAYOUT_VERSION,
                self.rule.name if self.rule.code is None else self.rule.code.digest,
                self.size,
                asked,
                pool.tokens.fingerprint,
                {name: pool.scores[name].manifest.fingerprint for name in self.rule.scorers},
                pool.contamination.manifest.fingerprint if pool.contamination else None,
                sorted(prior_rows.items()),
                *([carried] if any(carried) else []),
                *([{"benchmarks": shared, "taken_down": taken}] if shared or taken else []),
            ]
        )

    def _cut(self, ranks: list[Ranks]) -> Cut | QuotaCut:
        settings, size, pool = self.settings, self.size, self.pool.pool
        run = partial(run_tasks, self.ctx)
        if size is None and settings.min_score is not None:
            return threshold_cut(settings.min_score)
        if size is None and settings.threshold_from is not None:
            return threshold_cut(_threshold(self.ctx.store, settings.threshold_from))
        if settings.grain == "documents":
            weighted = {i: part.weighted for i, part in enumerate(ranks)}
            return find_weighted_cut(weighted, size or pool.token_budget(), run=run)
        count = size or pool.row_budget()
        if not pool.has_shares:
            return find_cut(dict(enumerate(ranks)), count, run=run)
        shares = named_shares(settings.max_share, settings.min_share, pool.sources)
        parts = {i: part.with_sources for i, part in enumerate(ranks)}
        return find_quota_cut(parts, count, names=pool.sources.labels, **shares, run=run)

    def _num_kept(self, ranking: "_Ranking", cut: Cut | QuotaCut) -> list[int]:
        """How many rows of each part a cut among the tables keeps."""
        items = list(zip(range(len(ranking.tables)), ranking.tables, ranking.rows, strict=True))
        found = run_tasks(self.ctx, partial(_num_kept, cut), items)
        kept = [count for counts in found for count in counts]
        if not sum(kept):
            raise BudgetError(f"nothing reaches the threshold {cut.score:g}: lower `min_score`")
        return kept

    def _write_tasks(
        self, name: str, ranking: "_Ranking", kept: list[int], cut: Cut | QuotaCut
    ) -> list[WriteTask]:
        """Tasks for groups of input parts, by how many rows each part keeps."""
        pool, seed, parts = self.pool, self.settings.seed, ranking.parts
        tokens, ranks = pool.tokens.parts, ranking.of_parts
        part_rows = max(part.num_rows for part in tokens)
        groups = group_parts([part.sha256 for part in tokens], kept, part_rows, seed)
        source = pool.spec.pool.model_copy(update={"keep_columns": self.keep_columns})
        tokenizer = (pool.tokenizer.path, pool.tokenizer.eos_token) if self.with_text else None
        span = join_spans((part["span"] for part in parts), SCORE_SPAN)
        loss_span = join_spans((part["loss_span"] for part in parts), LOSS_SPAN)
        return [
            WriteTask(
                selection=name,
                number=number,
                members=tuple(Member(i, tokens[i], ranks[i], pool.pool.files[i]) for i in group),
                grain=self.settings.grain,
                cut=cut,
                sources=pool.pool.sources,
                source=source,
                tokenizer=tokenizer,
                seed=seed,
                span=span,
                loss_span=loss_span,
            )
            for number, group in enumerate(groups)
        ]

    def _finish(self, name: str, cut: Cut | QuotaCut, receipts: list[Receipt]) -> Manifest:
        pool, store, rule = self.pool, self.ctx.store, self.rule
        tally = Tally()
        for receipt in receipts:
            tally.add(Tally.from_json(receipt.info["tally"]))
        tally.rows = sorted(tally.rows, key=lambda row: row["part"])
        ledger = parquet_bytes(pa.Table.from_pylist(tally.rows, schema=LEDGER_SCHEMA))
        ledger = create_or_adopt(store.path(about(f"selections/{name}"), LEDGER), ledger)
        scores = {n: pool.scores[n].manifest.fingerprint for n in scorers_read(rule, pool.scores)}
        flags, shared = pool.contamination, pool.benchmarks
        taken = pool.takedown.put() if pool.takedown else None
        manifest = Manifest(
            kind="selections",
            fingerprint=name,
            parts=tuple(receipt.parts[0] for receipt in receipts),
            inputs={
                "tokens": pool.tokens.fingerprint,
                "scores": scores,
                "prior_rows": pool.prior_model if pool.prior_rows else None,
                "contamination": flags.manifest.fingerprint if flags else None,
            }
            | ({"benchmarks": shared.manifest.fingerprint} if shared else {})
            | ({"taken_down": taken} if taken else {}),
            settings=self.settings.model_dump()
            | {
                "rule": rule.name,
                "rule_code": rule.code.digest if rule.code else None,
                "prior_rows_excluded": pool.exclude_prior_rows,
                "tokenizer": pool.tokens.settings["tokenizer"],
            },
            totals={
                "threshold": cut.score,
                "cut": cut_to_json(cut),
                "source_names": pool.pool.sources.labels,
                "groups": len(receipts),
                "tally": replace(tally, rows=[]).to_json(),
            },
            files={LEDGER: sha256(ledger)},
        )
        return store.put_manifest(manifest)


def _threshold(store: Store, name: str) -> float:
    return open_selection(find_input(store, name)).threshold


def _too_few(counted: list[dict[str, Any]], error: BudgetError) -> BudgetError:
    """Add how many rows are not eligible, and why."""
    counts = sum((Counter(part["fates"]) for part in counted), Counter[str]())
    hidden = [f"{counts[key]:,} {text}" for key, text in _NOT_ELIGIBLE.items() if counts[key]]
    if not hidden:
        return error
    return BudgetError(
        f"{counts['eligible']:,} of {counts.total():,} rows are eligible: {'; '.join(hidden)}. "
        f"So: {error}"
    )


class _Ranking:
    """The ranked pool: tables of the rows of several parts each.

    Attributes:
        tables: in order, as the cut reads them.
        parts: what is known of each part (`RankTask`).
        rows: of the parts of each table.
        of_parts: where the rows of each part are.
    """

    def __init__(self, store: Store, receipts: Sequence[Receipt]) -> None:
        self.tables = [Ranks(store.path(receipt.parts[0].path)) for receipt in receipts]
        self.parts: list[dict[str, Any]] = []
        self.rows: list[list[int]] = []
        self.of_parts: list[PartRanks] = []
        for receipt in receipts:
            infos = receipt.info["parts"]
            rows = [info["rows"] for info in infos]
            starts = [0, *accumulate(rows)]
            self.parts += infos
            self.rows.append(rows)
            self.of_parts += [
                PartRanks(receipt.parts[0], start, count)
                for start, count in zip(starts, rows, strict=False)
            ]


def _num_kept(cut: Cut | QuotaCut, item: tuple[int, Ranks, list[int]]) -> list[int]:
    """Rows that a cut keeps of each part in the table with this index."""
    index, ranks, rows = item
    kept = np.cumsum(np.concatenate([[0], cut.mask(index, *ranks.with_sources())]))
    return np.diff(kept[[0, *accumulate(rows)]]).tolist()
