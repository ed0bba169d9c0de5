"""Gathering what the report shows from the artifacts of a finished select job."""

from importlib.metadata import version
from itertools import islice
from typing import Literal

from stillhouse.cost import paper_cost
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.report_health import health_inputs, target_scores
from stillhouse.pipelines.scan import dead_letters, dead_letters_uri
from stillhouse.pipelines.select import SelectRun
from stillhouse.report.data import (
    BadInput,
    Curve,
    DeadLetters,
    Density,
    Drop,
    ExampleRow,
    Histogram,
    ReportData,
    SeenUnseen,
    SourceRow,
    StepCost,
    TargetLossRow,
    TrainingRow,
)
from stillhouse.report.health import check_health
from stillhouse.selection.ledger import SourceTally, Tally, loss_edges, score_edges
from stillhouse.selection.ranking import PartScores, RankedPart
from stillhouse.spec import SelectionSettings, SelectSpec
from stillhouse.storage.parquet import read_table
from stillhouse.storage.run_record import now
from stillhouse.text.pieces import read_pieces, row_texts
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer

_LIBRARIES = ("ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy")
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
    trainings, targets = training_rows(made), _targets(made)
    scores = target_scores(ctx, spec, made)
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
        target_scores=scores,
        losses=_losses(tally),
        examples=_examples(ctx, tally, ranked, tokenizer),
        curves=_curves(made),
        targets=targets,
        trainings=trainings,
        drops=_drops(made, tally),
        dead_letters=DeadLetters(dead, _letters(ctx, made)),
        costs=_costs(ctx, made),
        paper=_paper(spec, made),
        warnings=check_health(
            health_inputs(
                ctx,
                spec,
                made,
                tokenizer,
                sources=sources,
                seen=seen,
                targets=targets,
                trainings=trainings,
                scores=scores,
            )
        ),
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


def _source(name: str, row: SourceTally) -> SourceRow:
    scores = row.scores
    mean, spread = (scores.mean, scores.std) if scores.count else (None, None)
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
) -> list[ExampleRow]:
    found: list[ExampleRow] = []
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
                ExampleRow(
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


def _targets(made: SelectRun) -> list[TargetLossRow]:
    return [
        TargetLossRow(name, m[0].totals["num_tokens"], [x.totals["curve"][-1][1] for x in m])
        for name, m in made.targets.items()
    ]


def training_rows(made: SelectRun) -> list[TrainingRow]:
    """The trainings that the job's models come from, in this run or an earlier one."""
    targets = [model for models in made.targets.values() for model in models]
    return [
        TrainingRow(
            name=model.totals["label"],
            num_tokens=model.totals["num_tokens"],
            num_steps=model.totals["num_steps"],
            learning_rate=model.settings["learning_rate"],
            global_batch=model.settings["global_batch"],
            final_loss=model.totals["final_loss"],
            late_fall=model.totals.get("late_fall"),
        )
        for model in (*made.trained.values(), *targets)
    ]


def _drops(made: SelectRun, tally: Tally) -> list[Drop]:
    counts = made.pool.counts
    copies = [
        Drop(name.removeprefix("dropped: "), None, number, None)
        for name, number in sorted(counts.items())
        if name.startswith("dropped: ")
    ]
    left = counts["remainder_documents"] or None
    remainder = Drop("left over at the end of a part", None, left, counts["remainder_tokens"])
    rows = [
        Drop(reason, tally.fates[reason], None, tally.fate_tokens[reason])
        for reason in ("contaminated", "prior row", "nan")
        if tally.fates[reason]
    ]
    return [*copies, remainder, *rows]


def _letters(ctx: Context, made: SelectRun) -> list[BadInput]:
    rows = (row for scanned in made.scanned.sources for row in dead_letters(ctx.store, scanned))
    return [
        BadInput(r["file"], r["row"], r["reason"], r["preview"])
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
