"""The exact global cut over stored scores, and the selection's parts."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from stillhouse.errors import BudgetError
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.pipelines.candidates import Candidates, PoolSources, excludes_prior_rows
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import selection_uri
from stillhouse.pipelines.steps import Step, perform, run_tasks
from stillhouse.reading.readers import open_selection
from stillhouse.selection.budget import Cut, find_cut, find_weighted_cut, threshold_cut
from stillhouse.selection.ledger import LEDGER_SCHEMA, LOSS_SPAN, SCORE_SPAN, Tally, join_spans
from stillhouse.selection.quotas import QuotaCut, cut_to_json, find_quota_cut, named_shares
from stillhouse.selection.ranking import (
    RULE_VERSION,
    RankedPart,
    Ranks,
    RankTask,
    scorers_read,
)
from stillhouse.selection.rules import NamedRule
from stillhouse.selection.writing import (
    Member,
    WriteTask,
    group_parts,
)
from stillhouse.spec import SelectionSettings, SelectSpec
from stillhouse.storage.artifact import Manifest, Receipt, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.layout import LAYOUT_VERSION, LEDGER, about
from stillhouse.storage.parquet import parquet_bytes

_NOT_ELIGIBLE = {
    "contaminated": "share 13 words with the held-out target (give another `target.heldout`, or "
    "set `selection.exclude_contaminated: false`)",
    "prior row": "were trained on by the prior (`selection.exclude_prior_rows`)",
    "nan": "have no score (NaN)",
}


@dataclass(frozen=True, slots=True)
class Selected:
    """A selection artifact."""

    manifest: Manifest

    @property
    def tally(self) -> Tally:
        """What its making counted."""
        return Tally.from_json(self.manifest.totals["tally"])

    @property
    def threshold(self) -> float:
        """Score of the worst kept row."""
        return float(self.manifest.totals["threshold"])


def select(
    ctx: Context,
    spec: SelectSpec,
    pool: Candidates,
    *,
    rule: NamedRule,
    size: int | None = None,
) -> Selected:
    """Rank, cut exactly, and write the kept rows.

    Args:
        ctx: the run.
        spec: how much, of what grain, with which shares.
        pool: what may be chosen.
        rule: how rows are ranked.
        size: rows to keep (tokens, where documents are chosen), instead of what `spec` says:
            controls are as large as the selection they are compared with.

    Raises:
        BudgetError: more asked than there is, or shares that cannot all hold.
    """
    settings = spec.selection
    main = rule.name == spec.rule
    carried = _carried(pool, settings) if main else ([], False)
    name = _identity(ctx.store, pool, settings, rule, size, carried)
    found = ctx.store.find_manifest("selections", name)
    groups = found.totals["groups"] if found else 0
    step = "selection" if main else f"control {rule.name}"
    if found is not None or ctx.dry:
        with ctx.step(step, total=groups or 1, reused=groups):
            assert found is not None  # a dry step without one ends here
        return Selected(found)
    ranked = pool.ranked(ctx.store, spec, rule)
    shared = settings.max_share is not None or settings.min_share is not None
    sources = pool.sources.get() if shared and size is None else None
    ranking = "rank" if main else f"rank {rule.name}"
    receipts = perform(ctx, Step(ranking, [RankTask(part, sources) for part in ranked]))
    ranks = [Ranks(ctx.store.path(receipt.parts[0].path)) for receipt in receipts]
    looks = [receipt.info for receipt in receipts]
    try:
        cut = _cut(ctx, ranks, pool, settings, size)
    except BudgetError as error:
        raise _too_few(looks, error) from None
    tasks = _groups(ctx, name, ranked, ranks, looks, pool, settings, carried, cut)
    receipts = perform(ctx, Step(step, tasks))
    return Selected(_finish(ctx.store, name, pool, settings, rule, cut, receipts))


def size_of(kept: Selected, settings: SelectionSettings) -> int:
    """What a control must keep to be as large: sequences, or tokens of documents."""
    manifest = kept.manifest
    return manifest.num_rows if settings.grain == "sequences" else manifest.num_tokens


def _identity(
    store: Store,
    pool: Candidates,
    settings: SelectionSettings,
    rule: NamedRule,
    size: int | None,
    carried: tuple[list[str], bool],
) -> str:
    """Everything that decides which rows are kept and in which order they stand."""
    hidden = pool.prior_rows if pool.exclude_prior_rows else {}
    prior_rows = {sha: sha256(rows.tobytes()) for sha, rows in hidden.items()}
    asked = settings.model_dump(exclude={"text", "rule"})
    if settings.threshold_from is not None:
        asked["threshold_from"] = open_selection(
            selection_uri(store, settings.threshold_from)
        ).threshold
    return fingerprint(
        [
            "selection",
            RULE_VERSION,
            LAYOUT_VERSION,
            rule.name if rule.code is None else rule.code.digest,
            size,
            asked,
            pool.tokens.fingerprint,
            {name: pool.scores[name].manifest.fingerprint for name in rule.scorers},
            pool.contamination.manifest.fingerprint if pool.contamination else None,
            sorted(prior_rows.items()),
            *([carried] if any(carried) else []),
        ]
    )


def _carried(pool: Candidates, settings: SelectionSettings) -> tuple[list[str], bool]:
    """The columns that rows carry, and whether sequences get their text: not those of controls."""
    return pool.source.keep_columns, settings.text and settings.grain == "sequences"


def _cut(
    ctx: Context,
    ranks: list[Ranks],
    pool: Candidates,
    settings: SelectionSettings,
    size: int | None,
) -> Cut | QuotaCut:
    run = partial(run_tasks, ctx)
    if size is None and settings.min_score is not None:
        return threshold_cut(settings.min_score)
    if size is None and settings.threshold_from is not None:
        uri = selection_uri(ctx.store, settings.threshold_from)
        return threshold_cut(open_selection(uri).threshold)
    if settings.grain == "documents":
        budget = size or _token_budget(pool.tokens, settings)
        return find_weighted_cut({i: p.weighted for i, p in enumerate(ranks)}, budget, run=run)
    count = size or _row_budget(pool.tokens, settings)
    if settings.max_share is None and settings.min_share is None:
        return find_cut(dict(enumerate(ranks)), count, run=run)
    sources = pool.sources.get()
    return find_quota_cut(
        {i: part.with_sources for i, part in enumerate(ranks)},
        count,
        names=sources.labels,
        **named_shares(settings.max_share, settings.min_share, sources),
        run=run,
    )


def _too_few(looks: list[dict[str, Any]], error: BudgetError) -> BudgetError:
    """Say why rows may not be chosen, where some may not: that is what makes them too few."""
    fates = sum((Counter(look["fates"]) for look in looks), Counter[str]())
    hidden = [
        f"{fates[reason]:,} {said}" for reason, said in _NOT_ELIGIBLE.items() if fates[reason]
    ]
    if not hidden:
        return error
    return BudgetError(
        f"{fates['eligible']:,} of {fates.total():,} rows may be chosen: {'; '.join(hidden)}. "
        f"So: {error}"
    )


def check_size(tokens: Manifest, settings: SelectionSettings, hidden: int = 0) -> None:
    """Refuse a selection that is empty or larger than the pool, before the pool is scored.

    `hidden`: rows that are known not to be eligible.

    Raises:
        BudgetError: saying what is asked and what is there.
    """
    if settings.min_score is not None or settings.threshold_from is not None:
        return
    if settings.grain == "sequences":
        count, there = _row_budget(tokens, settings), tokens.num_rows - hidden
        if count > there:
            raise BudgetError(
                f"{count:,} sequences asked, but the prior was trained on {hidden:,} of the "
                f"pool's {tokens.num_rows:,} and they are excluded, {there:,} are left: keep less, "
                "or set `selection.exclude_prior_rows: false`"
            )
    elif _token_budget(tokens, settings) > tokens.num_tokens:
        raise BudgetError(
            f"the selection is larger than the pool: {settings.num_tokens:,} tokens asked, "
            f"{tokens.num_tokens:,} there (`selection.num_tokens`)"
        )


def check_size_beside_prior(spec: SelectSpec, tokens: Manifest, num_rows: int) -> None:
    """Refuse a selection larger than what a prior leaves that is trained on so many rows.

    Raises:
        BudgetError: as `check_size`.
    """
    if excludes_prior_rows(spec, tokens, num_rows):
        check_size(tokens, spec.selection, hidden=num_rows)


def check_shares(sources: PoolSources, tokens: Manifest, settings: SelectionSettings) -> None:
    """Refuse shares that cannot be held, before the pool is scored.

    Raises:
        BudgetError: as `PoolSources.check_shares`.
    """
    if settings.max_share is not None or settings.min_share is not None:
        sources.check_shares(_row_budget(tokens, settings))


def _row_budget(tokens: Manifest, settings: SelectionSettings) -> int:
    """Sequences to keep, of all that the pool has: tau is their ratio (Algorithm 1)."""
    total, length = tokens.num_rows, tokens.settings["sequence_length"]
    if settings.tau is not None:
        count = int(total / settings.tau)
    elif settings.fraction is not None:
        count = int(total * settings.fraction)
    else:
        assert settings.num_tokens is not None
        count = settings.num_tokens // length
    if count < 1:
        raise BudgetError(f"the selection would be empty: the pool has {total:,} sequences")
    if count > total:
        raise BudgetError(
            f"the selection is larger than the pool: {count:,} sequences asked, {total:,} there "
            "(`selection.num_tokens`)"
        )
    return count


def _token_budget(tokens: Manifest, settings: SelectionSettings) -> int:
    if settings.num_tokens is not None:
        return settings.num_tokens
    share = 1 / settings.tau if settings.tau is not None else settings.fraction
    assert share is not None
    return int(tokens.num_tokens * share)


def _groups(
    ctx: Context,
    name: str,
    ranked: list[RankedPart],
    ranks: list[Ranks],
    looks: list[dict[str, Any]],
    pool: Candidates,
    settings: SelectionSettings,
    carried: tuple[list[str], bool],
    cut: Cut | QuotaCut,
) -> list[WriteTask]:
    """Group the input parts by how many rows each keeps (counted first: scores are small)."""
    sources = pool.sources.get()
    columns, text = carried
    kept = list(run_tasks(ctx, partial(_num_kept, cut), list(enumerate(ranks))))
    span = join_spans((look["span"] for look in looks), SCORE_SPAN)
    loss_span = join_spans((look["loss_span"] for look in looks), LOSS_SPAN)
    if not sum(kept):
        raise BudgetError(f"nothing reaches the threshold {cut.score:g}: lower `min_score`")
    part_rows = max(part.num_rows for part in pool.tokens.parts)
    groups = group_parts([p.tokens.sha256 for p in ranked], kept, part_rows, settings.seed)
    return [
        WriteTask(
            selection=name,
            number=number,
            members=tuple(Member(i, ranked[i], pool.files[i]) for i in group),
            cut=cut,
            threshold=cut.score,
            sources=sources,
            source=pool.source.model_copy(update={"keep_columns": columns}),
            tokenizer=(pool.tokenizer.path, pool.tokenizer.eos_token) if text else None,
            seed=settings.seed,
            span=span,
            loss_span=loss_span,
        )
        for number, group in enumerate(groups)
    ]


def _num_kept(cut: Cut | QuotaCut, item: tuple[int, Ranks]) -> int:
    """Rows that a cut keeps of the part with this index."""
    index, ranks = item
    if isinstance(cut, QuotaCut):
        return int(cut.mask(index, *ranks.with_sources()).sum())
    return int(cut.mask(index, ranks()).sum())


def _finish(
    store: Store,
    name: str,
    pool: Candidates,
    settings: SelectionSettings,
    rule: NamedRule,
    cut: Cut | QuotaCut,
    receipts: list[Receipt],
) -> Manifest:
    tally = Tally()
    for receipt in receipts:
        tally.add(Tally.from_json(receipt.info["tally"]))
    tally.rows = sorted(tally.rows, key=lambda row: row["part"])
    ledger = parquet_bytes(pa.Table.from_pylist(tally.rows, schema=LEDGER_SCHEMA))
    ledger = create_or_adopt(store.path(about(f"selections/{name}"), LEDGER), ledger)
    manifest = Manifest(
        kind="selections",
        fingerprint=name,
        parts=tuple(receipt.parts[0] for receipt in receipts),
        inputs={
            "tokens": pool.tokens.fingerprint,
            "scores": {
                n: pool.scores[n].manifest.fingerprint for n in scorers_read(rule, pool.scores)
            },
            "prior_rows": pool.prior_model if pool.prior_rows else None,
            "contamination": pool.contamination.manifest.fingerprint
            if pool.contamination
            else None,
        },
        settings=settings.model_dump()
        | {
            "rule": rule.name,
            "rule_code": rule.code.digest if rule.code else None,
            "prior_rows_excluded": pool.exclude_prior_rows,
            "tokenizer": pool.tokens.settings["tokenizer"],
        },
        totals={
            "threshold": cut.score,
            "cut": cut_to_json(cut),
            "source_names": pool.sources.get().labels,
            "groups": len(receipts),
            "tally": replace(tally, rows=[]).to_json(),
        },
        files={LEDGER: sha256(ledger)},
    )
    return store.put_manifest(manifest)
