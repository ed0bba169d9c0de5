"""What the checks of a select job's report look at, gathered from its artifacts."""

from collections.abc import Sequence

import numpy as np

from stillhouse.pipelines.context import Context
from stillhouse.pipelines.select import SelectRun
from stillhouse.pipelines.selection import Selected
from stillhouse.report.data import (
    BASELINE,
    Difference,
    SeenUnseen,
    SourceRow,
    TargetLossRow,
    TargetScores,
    TrainingRow,
    difference,
)
from stillhouse.report.health import HealthInputs
from stillhouse.report.near_duplicates import near_duplicates
from stillhouse.selection.moments import Moments
from stillhouse.selection.ranking import SCORERS_OF, RankedPart
from stillhouse.selection.statistics import load_arrays
from stillhouse.spec import SelectSpec
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import Tokenizer

_SAMPLE_TEXTS = 2_000
_SAMPLE_PARTS = 16


def health_inputs(
    ctx: Context,
    spec: SelectSpec,
    made: SelectRun,
    tokenizer: Tokenizer,
    *,
    sources: Sequence[SourceRow],
    seen: SeenUnseen | None,
    targets: Sequence[TargetLossRow],
    trainings: Sequence[TrainingRow],
    scores: TargetScores | None,
) -> HealthInputs:
    """Counts and sums over the whole pool; texts, and the prior's loss, of a sample."""
    tally, counts = made.kept.tally, made.pool.counts
    num_heldout, num_short = _heldout_texts(ctx, made)
    return HealthInputs(
        target_scores=scores,
        absolute=spec.scorer is None,
        gain=_gain(targets, spec.rule),
        sources=sources,
        spread=tally.pieces.y.std,
        correlations={"the number of documents in a sequence": tally.pieces.correlation},
        num_scored=sum(tally.fates.values()),
        num_nan=tally.fates["nan"],
        num_kept=made.kept.manifest.num_rows,
        num_tied=tally.ties,
        seen=seen,
        near_duplicates=near_duplicates(_kept_texts(ctx, made.kept, tokenizer)),
        packed_tokens=counts["tokens"],
        remainder_tokens=counts["remainder_tokens"],
        num_documents=counts["documents"],
        num_dead_letters=made.scanned.sources[0].num_dead,
        num_heldout=num_heldout,
        num_short=num_short,
        trainings=trainings,
        unknown_tokens=counts["unknown_tokens"],
        sampled_documents=counts["sampled_documents"],
        changed_documents=counts["changed_documents"],
        prior_loss=_prior_loss(ctx, made),
        vocab_size=made.tokenizer.vocab_size,
    )


def target_scores(ctx: Context, spec: SelectSpec, made: SelectRun) -> TargetScores | None:
    """Held-out target text under the rule of the selection, and the pool's finite scores."""
    scored = {name: made.candidates.scores[name].heldout for name in SCORERS_OF[spec.rule]}
    found = Moments()
    for index, part in enumerate(made.heldout.manifest.parts):
        member = RankedPart(
            store=ctx.store,
            tokens=part,
            scores={name: paths[index] for name, paths in scored.items()},
            contamination=None,
            prior_rows=None,
            exclude_prior_rows=False,
            rule=spec.rule,
            grain=spec.selection.grain,
            seed=spec.selection.seed,
        )
        raw = member.read().raw.astype(np.float64)
        found.add(Moments.of(raw[np.isfinite(raw)]))
    pool = made.kept.tally.pieces.y
    if not found.count or not pool.count:
        return None
    return TargetScores(found.mean, found.std, found.count, pool.mean, pool.std, pool.count)


def _heldout_texts(ctx: Context, made: SelectRun) -> tuple[int, int]:
    """How many held-out texts the pool was searched for, and how many are too short for it."""
    found = made.candidates.contamination
    if found is None:
        return 0, 0
    folder = ctx.store.path("models", found.manifest.inputs["scorer"])
    num_texts, num_short = load_arrays(folder)["texts"].tolist()
    return num_texts, num_short


def _gain(targets: Sequence[TargetLossRow], rule: str) -> Difference | None:
    """Loss of the selection's target model minus that of the random control's."""
    rows = {row.name: row for row in targets}
    if rule not in rows or BASELINE not in rows:
        return None
    return difference(rows[rule], rows[BASELINE])


def _prior_loss(ctx: Context, made: SelectRun) -> float | None:
    """Its mean over the rows of `_SAMPLE_PARTS` parts, evenly spaced over the pool."""
    prior = made.candidates.scores.get("prior")
    if prior is None:
        return None
    chosen = prior.paths[:: -(-len(prior.paths) // _SAMPLE_PARTS)]
    values = [read_table(ctx.store.path(p), ["value"])["value"].to_numpy() for p in chosen]
    return float(np.nanmean(np.concatenate(values)))


def _kept_texts(ctx: Context, kept: Selected, tokenizer: Tokenizer) -> list[str]:
    """Texts of the first rows of the selection: its rows stand in a random order."""
    table = read_table(ctx.store.path(kept.manifest.parts[0].path)).slice(0, _SAMPLE_TEXTS)
    if "text" in table.column_names:
        return table["text"].to_pylist()
    return [tokenizer.decode(ids) for ids in table["input_ids"].to_pylist()]
