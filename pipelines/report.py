"""Gathering what the report shows from the artifacts of a finished select job."""

from importlib.metadata import version
from itertools import islice
from math import sqrt
from typing import Any, Literal

import numpy as np

from stillhouse.cost import paper_cost
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.scan import dead_letters, dead_letters_uri
from stillhouse.pipelines.select import SelectRun
from stillhouse.pipelines.selection import Selected
from stillhouse.report.data import (
    Curve,
    DeadLetter,
    DeadLetters,
    Density,
    Drop,
    Example,
    Histogram,
    ReportData,
    SeenUnseen,
    SourceRow,
    StepCost,
    TargetRow,
)
from stillhouse.report.health import HealthInputs, check_health
from stillhouse.report.near_duplicates import near_duplicates
from stillhouse.selection.ledger import Tally, loss_edges, score_edges
from stillhouse.selection.ranking import PartScores, RankedPart
from stillhouse.selection.statistics import load_arrays
from stillhouse.spec import SelectionSettings, SelectSpec
from stillhouse.storage.parquet import read_table
from stillhouse.storage.run_record import now
from stillhouse.text.pieces import read_pieces, row_texts
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
_SAMPLE_ROWS = 100_000
_SAMPLE_TEXTS = 2_000
_FIRST_LETTERS = 10
_REASONS = {
    "best": "among the best of the pool",
    "above": "just above the cut",
    "below": "just below the cut",
    "worst": "the models disagree least in its favour",
}
_PAPER_METHODS = ("color_filter", "conditional_only", "rho_down", "random")


def report_data(ctx: Context, spec: SelectSpec, made: SelectRun, run_uri: str) -> ReportData:
    """Everything the page shows, as plain numbers and texts."""
    kept = made.kept
    tally, pool = kept.tally, made.pool.manifest
    seen = _seen(tally, made.candidates.exclude_prior_rows)
    tokenizer = load_tokenizer(made.tokenizer.path, made.tokenizer.eos_token)
    ranked = made.candidates.ranked(ctx.store, spec, spec.rule)
    eligible = tally.fates["kept"] + tally.fates["below the cut"]
    pool_rows = sum(tally.fates.values())
    sources = [_source(name, row) for name, row in tally.sources.items()]
    letters = dead_letters_uri(ctx, made.scanned)
    dead = sum(scanned.num_dead for scanned in made.scanned.sources)
    return ReportData(
        title=spec.name or "Selection",
        created=now(),
        run_uri=run_uri,
        rule=rule_text(spec.selection),
        grain=spec.selection.grain,
        pool_sequences=pool_rows,
        pool_tokens=pool.num_tokens,
        kept_sequences=kept.manifest.num_rows,
        kept_tokens=kept.manifest.num_tokens,
        eligible_sequences=eligible,
        eligible_tokens=tally.fate_tokens["kept"] + tally.fate_tokens["below the cut"],
        threshold=kept.threshold,
        sources=sources,
        scorer=spec.scorer.import_ if spec.scorer else None,
        score_histogram=Histogram(
            score_edges(tally.span).tolist(), tally.pool_scores, tally.kept_scores
        ),
        seen=seen,
        losses=_losses(tally),
        examples=_examples(ctx, tally, ranked, tokenizer),
        curves=_curves(made),
        targets=_targets(made),
        drops=_drops(made, tally),
        dead_letters=DeadLetters(dead, _letters(ctx, made)),
        costs=_costs(ctx, made),
        paper=_paper(spec, made),
        warnings=check_health(_health(ctx, made, kept, ranked, sources, seen, tokenizer)),
        spec_yaml=spec.to_yaml(),
        artifacts=[
            ("selection", ctx.store.path("selections", kept.manifest.fingerprint)),
            ("tokens", ctx.store.path("tokens", pool.fingerprint)),
            ("tokenizer", made.tokenizer.path),
            *_folders(made),
            *([("dead letters", letters)] if letters else []),
        ],
        environment=environment(),
    )


def environment() -> list[tuple[str, str]]:
    """Versions of the libraries that matter."""
    return [(name, version(name)) for name in _LIBRARIES]


def _losses(tally: Tally) -> Density | None:
    edges = loss_edges(tally.loss_span).tolist()
    return (
        Density(edges, edges, tally.pool_losses, tally.kept_losses) if tally.pool_losses else None
    )


def _folders(made: SelectRun) -> list[tuple[str, str]]:
    models = ("prior", made.prior), ("conditional", made.conditional)
    return [(name, model.folder) for name, model in models if model is not None]


def rule_text(settings: SelectionSettings) -> str:
    """The size rule as the spec has it, such as `tau = 8`."""
    for name in ("tau", "num_tokens", "fraction", "min_score", "threshold_from"):
        value = getattr(settings, name)
        if value is not None:
            return f"{name} = {value:g}" if isinstance(value, float | int) else f"{name} = {value}"
    raise AssertionError("a selection has a rule")


def _source(name: str, row: Any) -> SourceRow:
    count = row.scored_rows
    mean = row.score_sum / count if count else None
    spread = sqrt(max(0.0, row.score_squares / count - mean**2)) if mean is not None else None
    return SourceRow(
        name, row.pool_tokens, row.kept_tokens, row.pool_rows, row.kept_rows, mean, spread
    )


def _seen(tally: Tally, excluded: bool) -> SeenUnseen | None:
    rows, others = int(tally.seen[0]), int(tally.unseen[0])
    if not rows or not others:
        return None
    return SeenUnseen(rows, tally.seen[1] / rows, others, tally.unseen[1] / others, excluded)


def _examples(
    ctx: Context, tally: Tally, ranked: list[RankedPart], tokenizer: Tokenizer
) -> list[Example]:
    found: list[Example] = []
    groups: tuple[Literal["best", "above", "below", "worst"], ...] = (
        "best",
        "above",
        "below",
        "worst",
    )
    for group in groups:
        for score, part, row in tally.examples.get(group, []):
            member = ranked[part]
            table = read_table(ctx.store.path(member.tokens.path))
            pieces = read_pieces(table)
            scores = member.read(pieces)
            text, source, document = row_texts(table, pieces, row, member.grain, tokenizer)
            found.append(
                Example(
                    group=group,
                    score=score,
                    prior_nll=_loss(scores, "prior", row),
                    conditional_nll=_loss(scores, "conditional", row),
                    source=source,
                    text=text,
                    part=member.tokens.path,
                    row=row,
                    document_id=document,
                    reason=_REASONS[group],
                )
            )
    return found


def _loss(scores: PartScores, name: str, row: int) -> float | None:
    return float(scores.losses[name][row]) if name in scores.losses else None


def _curves(made: SelectRun) -> list[Curve]:
    return [
        Curve(name, model.settings["seed"], [(t, nll) for t, nll in model.totals["curve"]])
        for name, models in made.targets.items()
        for model in models
    ]


def _targets(made: SelectRun) -> list[TargetRow]:
    return [
        TargetRow(name, m[0].totals["num_tokens"], [x.totals["curve"][-1][1] for x in m])
        for name, m in made.targets.items()
    ]


def _drops(made: SelectRun, tally: Tally) -> list[Drop]:
    counts = made.pool.counts
    copies = [
        Drop(name.removeprefix("dropped: "), None, number, None)
        for name, number in sorted(counts.items())
        if name.startswith("dropped: ")
    ]
    remainder = Drop("left over at the end of a part", None, None, counts["remainder_tokens"])
    rows = [
        Drop(reason, tally.fates[reason], None, tally.fate_tokens[reason])
        for reason in ("contaminated", "prior row", "nan")
        if tally.fates[reason]
    ]
    return [*copies, remainder, *rows]


def _letters(ctx: Context, made: SelectRun) -> list[DeadLetter]:
    rows = (row for scanned in made.scanned.sources for row in dead_letters(ctx.store, scanned))
    return [
        DeadLetter(r["file"], r["row"], r["reason"], r["preview"])
        for r in islice(rows, _FIRST_LETTERS)
    ]


def _costs(ctx: Context, made: SelectRun) -> list[StepCost]:
    length = made.pool.manifest.settings["sequence_length"]
    forward = made.prior.shape.flops_per_token(length) if made.prior else None
    return [
        StepCost(
            name,
            work.tokens,
            work.flops,
            work.seconds,
            work.flops / forward if work.flops and forward else None,
            work.parts > 0 and work.reused == work.parts,
        )
        for name, work in ctx.work.items()
    ]


def _paper(spec: SelectSpec, made: SelectRun) -> dict[str, float]:
    """The paper's totals for this job's m, n, tau and L; target training counts as planned."""
    if made.prior is None:
        return {}
    length = spec.sequence_length
    kept = made.kept.manifest.num_tokens
    tau = made.pool.manifest.num_tokens / kept
    target = spec.train.model if spec.train else spec.prior.model
    ratio = 1.0
    if target is not None:
        planned = planned_shape(target, made.tokenizer.vocab_size, length)
        ratio = planned.flops_per_token(length) / made.prior.shape.flops_per_token(length)
    return {
        method: paper_cost(method, made.prior.num_tokens, kept, tau, ratio).total
        for method in _PAPER_METHODS
    }


def _health(
    ctx: Context,
    made: SelectRun,
    kept: Selected,
    ranked: list[RankedPart],
    sources: list[SourceRow],
    seen: SeenUnseen | None,
    tokenizer: Tokenizer,
) -> HealthInputs:
    scores, pieces_a_row = _sampled_scores(ctx, ranked)
    tally, counts = kept.tally, made.pool.counts
    num_heldout, num_short = _heldout_texts(ctx, made)
    return HealthInputs(
        sources=sources,
        scores=scores,
        lengths={"the number of documents in a sequence": pieces_a_row},
        num_scored=sum(tally.fates.values()),
        num_nan=tally.fates["nan"],
        num_kept=kept.manifest.num_rows,
        num_tied=tally.ties,
        seen=seen,
        near_duplicates=near_duplicates(_kept_texts(ctx, kept, tokenizer)),
        packed_tokens=counts["tokens"],
        remainder_tokens=counts["remainder_tokens"],
        num_documents=counts["documents"],
        num_dead_letters=made.scanned.sources[0].num_dead,
        num_heldout=num_heldout,
        num_short=num_short,
        unknown_tokens=counts["unknown_tokens"],
        sampled_documents=counts["sampled_documents"],
        changed_documents=counts["changed_documents"],
        prior_loss=_prior_loss(ctx, made),
        vocab_size=made.tokenizer.vocab_size,
    )


def _heldout_texts(ctx: Context, made: SelectRun) -> tuple[int, int]:
    """How many held-out texts the pool was searched for, and how many are too short for it."""
    found = made.candidates.contamination
    if found is None:
        return 0, 0
    folder = ctx.store.path("models", found.manifest.inputs["scorer"])
    num_texts, num_short = load_arrays(folder)["texts"].tolist()
    return num_texts, num_short


def _prior_loss(ctx: Context, made: SelectRun) -> float | None:
    """Its mean over the rows of the first parts, `_SAMPLE_ROWS` of them or more."""
    prior = made.candidates.scores.get("prior")
    if prior is None:
        return None
    values: list[Any] = []
    for path in prior.paths:
        values.append(read_table(ctx.store.path(path), ["value"])["value"].to_numpy())
        if sum(map(len, values)) >= _SAMPLE_ROWS:
            break
    return float(np.nanmean(np.concatenate(values)))


def _sampled_scores(ctx: Context, ranked: list[RankedPart]) -> tuple[Any, Any]:
    """Scores and pieces of each row, of enough parts for `_SAMPLE_ROWS` rows."""
    scores: list[Any] = []
    pieces_a_row: list[Any] = []
    for member in ranked:
        pieces = read_pieces(read_table(ctx.store.path(member.tokens.path), ["documents"]))
        raw = member.read(pieces).raw
        row = pieces.owners() if member.grain == "documents" else pieces.sequence
        scores.append(raw.astype(np.float64))
        pieces_a_row.append(np.bincount(row, minlength=len(raw)).astype(np.float64))
        if sum(map(len, scores)) >= _SAMPLE_ROWS:
            break
    return np.concatenate(scores), np.concatenate(pieces_a_row)


def _kept_texts(ctx: Context, kept: Selected, tokenizer: Tokenizer) -> list[str]:
    """Texts of the first rows of the selection: its rows stand in a random order."""
    table = read_table(ctx.store.path(kept.manifest.parts[0].path)).slice(0, _SAMPLE_TEXTS)
    if "text" in table.column_names:
        return table["text"].to_pylist()
    return [tokenizer.decode(ids) for ids in table["input_ids"].to_pylist()]
