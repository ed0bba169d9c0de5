"""The warnings of a select job: the checks of `report.health` on its artifacts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import stillhouse.report.blocks as b
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.results import automatic
from stillhouse.pipelines.scores import Scores
from stillhouse.pipelines.select import SelectRun
from stillhouse.report import health
from stillhouse.selection.ledger import Moments
from stillhouse.selection.ranking import RankedPart
from stillhouse.selection.rules import find_rule
from stillhouse.selection.scorers import load_arrays
from stillhouse.selection.takedown import num_seen
from stillhouse.spec import SelectSpec
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.seen import read_seen

_SAMPLE_TEXTS = 2_000
_SAMPLE_PARTS = 16


def select_warnings(
    ctx: Context,
    spec: SelectSpec,
    made: SelectRun,
    gaps: Sequence[float],
    trainings: Mapping[str, Mapping[str, Any]],
    heldout: Moments,
) -> list[b.Warn]:
    """All warnings, the gravest first.

    Counts and sums are over the whole pool; texts and the prior's loss are sampled. `gaps` are the
    target model's losses minus the baseline's, `heldout` scores of target text.
    """
    tally, counts = made.kept.tally, made.pool.counts
    answers = spec.pool.columns.has_answers  # a sequence without any has no score
    texts = _kept_texts(ctx, made)
    pieces = "the number of documents in a sequence"
    recipes = {"prior": spec.prior, "conditional": spec.conditional}
    late = [
        (name, row["late_fall"], automatic(recipes.get(name, spec.train)))
        for name, row in trainings.items()
    ]
    return [
        *health.no_better_than_random(gaps),
        *health.target_scores(heldout, tally.pieces.y, absolute=spec.scorer is None),
        *health.knows_nothing(_prior_loss(ctx, made), made.tokenizer.vocab_size),
        *health.lost_text(counts),
        *([] if answers else health.nan_scores(tally.fates["nan"], sum(tally.fates.values()))),
        *health.split_answers(counts),
        *health.near_constant(tally.sources, tally.pieces.y.std),
        *health.mostly_length(pieces, tally.pieces.correlation),
        *health.memorised(tally, excluded=made.candidates.exclude_prior_rows),
        *health.one_source(tally.sources),
        *health.ties(tally.ties, made.kept.manifest.num_rows),
        *health.repeats(health.near_duplicates(texts), len(texts)),
        *health.remainder(counts),
        *health.unreadable(made.scanned.pool.num_dead, counts["documents"]),
        *health.too_short(*_searched_texts(ctx, made.candidates.contamination)),
        *health.too_short(*_searched_texts(ctx, made.candidates.benchmarks), "benchmarks' texts"),
        *_takedown(made),
        *health.unfinished(late),
    ]


def heldout_scores(ctx: Context, spec: SelectSpec, made: SelectRun) -> Moments:
    """The finite scores of held-out target text under the selection's rule."""
    rule = find_rule("selection.rule", spec.rule)
    scored = {name: made.candidates.scores[name].heldout for name in rule.scorers}
    found = Moments()
    for index, part in enumerate(made.heldout.manifest.parts):
        member = RankedPart(
            store=ctx.store,
            tokens=part,
            scores={name: paths[index] for name, paths in scored.items()},
            contamination=None,
            prior_rows=None,
            exclude_prior_rows=False,
            rule=rule,
            grain=spec.selection.grain,
            seed=spec.selection.seed,
        )
        raw = member.read().raw.astype(np.float64)
        found.add(Moments.of(raw[np.isfinite(raw)]))
    return found


def _takedown(made: SelectRun) -> Iterator[b.Warn]:
    takedown = made.candidates.takedown
    if takedown is None:
        return
    yield from health.not_found(takedown.listed, takedown.found)
    if takedown.digest is not None:
        models = {"prior": made.prior, "conditional": made.conditional}
        seen = {
            name: num_seen(takedown.documents, read_seen(model.folder))
            for name, model in models.items()
            if model is not None
        }
        yield from health.seen_before(takedown.num_documents, seen)


def _searched_texts(ctx: Context, found: Scores | None) -> tuple[int, int]:
    """Number of texts too short to be searched for in the pool, and of all of them."""
    if found is None:
        return 0, 0
    folder = ctx.store.path("models", found.manifest.inputs["scorer"])
    num_texts, num_short = load_arrays(folder)["texts"].tolist()
    return num_short, num_texts


def _prior_loss(ctx: Context, made: SelectRun) -> float | None:
    """The mean over `_SAMPLE_PARTS` parts, evenly spaced over the pool."""
    prior = made.candidates.scores.get("prior")
    if prior is None:
        return None
    chosen = prior.paths[:: -(-len(prior.paths) // _SAMPLE_PARTS)]
    values = [read_table(ctx.store.path(p), ["value"])["value"].to_numpy() for p in chosen]
    return float(np.nanmean(np.concatenate(values)))


def _kept_texts(ctx: Context, made: SelectRun) -> list[str]:
    """Texts of the selection's first rows, whose order is random."""
    path = made.kept.manifest.parts[0].path
    rows = read_table(ctx.store.path(path)).slice(0, _SAMPLE_TEXTS)
    if "text" in rows.column_names:
        return rows["text"].to_pylist()
    tokenizer = load_tokenizer(made.tokenizer.path, made.tokenizer.eos_token)
    return [tokenizer.decode(ids) for ids in rows["input_ids"].to_pylist()]
