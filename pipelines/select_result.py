"""The result of a select job: its numbers, and the sections of its report."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.cost import paper_cost
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.left_out import benchmark_rows, drops_of, left_out, takedown_numbers
from stillhouse.pipelines.results import assemble, cost_numbers, heldout_halves, mean_std
from stillhouse.pipelines.scan import dead_letters_uri
from stillhouse.pipelines.select import SelectRun
from stillhouse.pipelines.select_warnings import heldout_scores, select_warnings
from stillhouse.report.formatting import compact, decimals, percent, signed, words
from stillhouse.selection.ledger import Moments, SourceTally, loss_edges, score_edges
from stillhouse.selection.quotas import OTHER
from stillhouse.selection.rules import find_rule
from stillhouse.spec import SelectionSettings, SelectSpec
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import read_pieces, row_texts
from stillhouse.text.tokenizer import load_tokenizer

Losses = Mapping[str, Sequence[float]]
"""Held-out losses of target models by rule, in the order of seeds."""
BASELINE = "random"
"""The rule that target models are compared with."""
_SHOWN_SOURCES = 12
_GROUPS = (
    ("best", "The best", "kept: among the best of the pool"),
    ("above", "Just above the cut", "kept"),
    ("below", "Just below the cut", "score below the cut"),
    ("worst", "The worst", "score below the cut"),
)
_PAPER_METHODS = ("color_filter", "conditional_only", "rho_down", BASELINE)
_CHECKED = (
    "Spread inside sources, dependence on length, NaN, ties at the cut, near-duplicates, one "
    "source taking all, memorised sequences, packing losses and unreadable rows were checked."
)
_PAPER = "Scores: Brandfonbrener, Zhang, Kirsch, Schwarz, Kakade, CoLoR-Filter, NeurIPS 2024. "


def select_result(ctx: Context, spec: SelectSpec, made: SelectRun, run_uri: str) -> b.Result:
    kept, tally = made.kept, made.kept.tally
    losses = {
        name: [model.totals["curve"][-1][1] for model in models]
        for name, models in made.targets.items()
    }
    gaps, heldout = gaps_of(losses, spec.rule), heldout_scores(ctx, spec, made)
    trainings, drops, paper = _trainings(made), drops_of(made), _paper(spec, made)
    warnings = select_warnings(ctx, spec, made, gaps, trainings, heldout)
    main = [ctx.work[n] for n in ("score prior", "score conditional", "score") if n in ctx.work]
    work = {name: {"parts": w.parts, "reused": w.reused} for name, w in ctx.work.items()}
    work["scores"] = {key: sum(getattr(w, key) for w in main) for key in ("parts", "reused")}
    numbers = {
        "selection_fingerprint": kept.manifest.fingerprint,
        "work": work,
        "selection": {
            "num_sequences": kept.manifest.num_rows,
            "num_tokens": kept.manifest.num_tokens,
            "threshold": kept.threshold,
            "sources": {
                name: {"pool_tokens": row.pool_tokens, "kept_tokens": row.kept_tokens}
                for name, row in sorted(tally.sources.items())
            },
            "fates": dict(tally.fates),
        },
        "dropped": {name: drop[0] for name, drop in drops.items() if drop[0] is not None},
        "exclude": takedown_numbers(made),
        "decontaminate": benchmark_rows(made),
        "dead_letters": sum(scanned.num_dead for scanned in made.scanned.all),
        "training": trainings,
        "target": {
            name: {
                "heldout_nll": fmean(found),
                "heldout_nll_by_seed": found,
                "heldout_halves": heldout_halves([one.totals for one in made.targets[name]]),
                "num_tokens": made.targets[name][0].totals["num_tokens"],
            }
            for name, found in losses.items()
        },
        "cost": cost_numbers(ctx.work) | {"paper": paper},
    }
    if spec.targets:
        pairs = zip(spec.targets.items(), made.domains.values(), strict=True)
        numbers["targets"] = {
            name: {"weight": one.weight, "num_tokens": tokens.manifest.num_tokens}
            for (name, one), tokens in pairs
        }
    length = made.pool.manifest.settings["sequence_length"]
    return assemble(
        ctx,
        spec,
        spec.job,
        run_uri,
        title="Selection",
        artifacts=_artifacts(ctx, made),
        numbers=numbers,
        warnings=b.Warnings(warnings, _CHECKED),
        lead=_lead(spec, made, losses),
        sections=[
            b.Section("sources", "What was kept", _sources(tally.sources)),
            b.Section("scores", "How it was chosen", _scores(spec, made, heldout)),
            b.Section("examples", "Read some", _examples(ctx, spec, made)),
            b.Section("target", "Does it help?", _targets(spec.rule, made, losses)),
            b.Section("training", "How the models were trained", _training(trainings)),
            b.Section("dropped", "What was left out", left_out(ctx, made, drops)),
        ],
        cost=_paper_cost(paper),
        footer=f"{'' if spec.scorer else _PAPER}Losses are means over a sequence's predicted "
        "tokens, in nats.",
        forward=made.prior.shape.flops_per_token(length) if made.prior else None,
    )


def gaps_of(losses: Losses, rule: str) -> list[float]:
    """A rule's losses minus the baseline's by seed; of the means where seeds do not pair up."""
    mine, others = losses.get(rule, ()), losses.get(BASELINE, ())
    if not mine or not others:
        return []
    if len(mine) != len(others):
        return [fmean(mine) - fmean(others)]
    return [one - other for one, other in zip(mine, others, strict=True)]


def rule_text(settings: SelectionSettings) -> str:
    """The size rule as the spec has it, such as `tau = 8`."""
    names = ("tau", "num_tokens", "fraction", "min_score", "threshold_from")
    name = next(name for name in names if getattr(settings, name) is not None)
    value = getattr(settings, name)
    return f"{name} = {value:g}" if isinstance(value, float | int) else f"{name} = {value}"


def _artifacts(ctx: Context, made: SelectRun) -> dict[str, Any]:
    def uri(manifest: Manifest) -> str:
        return ctx.store.path(manifest.kind, manifest.fingerprint)

    scores = made.candidates.scores
    return {
        "tokens": uri(made.pool.manifest),
        "target_tokens": uri(made.target.manifest),
        "heldout_tokens": uri(made.heldout.manifest),
        "tokenizer": made.tokenizer.path,
        "prior": made.prior.folder if made.prior else None,
        "conditional": made.conditional.folder if made.conditional else None,
        "scores": {name: uri(found.manifest) for name, found in scores.items()},
        "heldout_scores": {
            name: [ctx.store.path(path) for path in found.heldout]
            for name, found in scores.items()
            if found.heldout
        },
        "selection": uri(made.kept.manifest),
        "controls": {n: uri(s.manifest) for n, s in made.selections.items() if s is not made.kept},
        "dead_letters": dead_letters_uri(ctx, made.scanned),
        "targets": {n: [uri(model) for model in models] for n, models in made.targets.items()},
    }


def _trainings(made: SelectRun) -> dict[str, dict[str, Any]]:
    """Trainings of the job's models, in this run or an earlier one."""
    targets = [model for models in made.targets.values() for model in models]
    return {
        model.totals["label"]: {
            **{key: model.totals[key] for key in ("num_tokens", "num_steps", "final_loss")},
            **{key: model.settings["train"][key] for key in ("learning_rate", "global_batch")},
            "late_fall": model.totals.get("late_fall"),
        }
        for model in (*made.trained.values(), *targets)
    }


def _lead(spec: SelectSpec, made: SelectRun, losses: Losses) -> list[b.Block]:
    tally, kept = made.kept.tally, made.kept.manifest
    pool, grain = made.pool.manifest.num_tokens, spec.selection.grain
    share = kept.num_tokens / max(1, pool)
    story = (
        f"Of {compact(pool)} tokens in the pool, **{compact(kept.num_tokens)} were kept**: "
        f"{percent(share)}, by the rule {rule_text(spec.selection)}."
    )
    if gaps := gaps_of(losses, spec.rule):
        gain, once = fmean(gaps), " in one run of each" if len(losses[spec.rule]) == 1 else ""
        story += (
            f" A model trained on them ends **{decimals(abs(gain), 2)} nats "
            f"{'under' if gain < 0 else 'above'}** one trained on as many random tokens, measured "
            f"on held-out target text{once}."
        )
    fates, tokens = tally.fates, tally.fate_tokens
    eligible = tokens["kept"] + tokens["below the cut"], fates["kept"] + fates["below the cut"]
    unit = "of the scorer" if spec.scorer else "nats per token"
    tiles = [
        b.Fact("Pool", compact(pool), f"{compact(sum(fates.values()))} {grain}"),
        b.Fact("Eligible", compact(eligible[0]), f"{compact(eligible[1])} {grain}"),
        b.Fact("Kept", compact(kept.num_tokens), f"{compact(kept.num_rows)} {grain}", main=True),
        b.Fact("The cut", decimals(made.kept.threshold), unit),
    ]
    if spec.rule in losses:
        beside = f"random {decimals(fmean(losses[BASELINE]))}" if BASELINE in losses else unit
        tiles.append(b.Fact("Held-out loss", decimals(fmean(losses[spec.rule])), beside, main=True))
    return [
        b.Text(story, "story", terminal=True),
        b.Facts(tiles, share=share, terminal=True),
    ]


def _sources(sources: Mapping[str, SourceTally]) -> list[b.Block]:
    """Shares of all tokens in pool and selection, by descending share of the kept."""
    pool = sum(row.pool_tokens for row in sources.values()) or 1
    kept = sum(row.kept_tokens for row in sources.values()) or 1
    shares = {n: (row.pool_tokens / pool, row.kept_tokens / kept) for n, row in sources.items()}
    widest = max((max(pair) for pair in shares.values()), default=0) or 1
    rows: list[list[b.Cell]] = []
    for name, (in_pool, in_kept) in shares.items():
        scores, ratio = sources[name].scores, in_kept / in_pool if in_pool else None
        score: b.Cell = [scores.mean, scores.std] if scores.count else None
        bars: b.Cell = [in_pool / widest, in_kept / widest]
        rows.append([name, bars, in_pool, in_kept, ratio, score])
    rows.sort(key=lambda cells: (-cells[3], -cells[2], cells[0]))  # type: ignore[operator]
    other = f" The thousand largest sources are counted one by one, all others as {OTHER}."
    intro = (
        "Each source's share of all tokens, [pool: in the pool] and [kept: among the kept]. The "
        "ratio says how much richer the selection is in a source than the pool; the score is the "
        f"mean over the pool.{other if OTHER in sources else ''}"
    )
    columns = {"Source": "text", "shares": "bars", "pool": "percent", "kept": "percent"}
    columns |= {"ratio": "ratio", "score": "decimals2"}
    table = b.Table(columns, rows, shown=_SHOWN_SOURCES, style="stacked", terminal=True)
    return [b.Text(intro), table] if rows else []


def _scores(spec: SelectSpec, made: SelectRun, heldout: Moments) -> list[b.Block]:
    tally, cut, grain = made.kept.tally, made.kept.threshold, spec.selection.grain
    intro = (
        f"A score is how far the loss of one of the {grain} falls from the prior, trained on the "
        "pool at large, to the conditional, the same model tuned on the target."
    )
    if spec.scorer is not None:
        intro = f"A score is what `{spec.scorer.import_}` says of a text, in its own unit."
    shown = "Scores of [pool: the pool] and [kept: the kept]"
    edges, unit = score_edges(tally.span).tolist(), "" if spec.scorer else ", nats per token"
    charts: list[b.Block] = [
        b.Histogram(shown, edges, tally.pool_scores, tally.kept_scores, cut, unit)
    ]
    if tally.pool_losses:
        shown = "The two losses: what was kept lies below the [cut: cut]"
        edges = loss_edges(tally.loss_span).tolist()
        charts.append(b.Cells(shown, edges, tally.pool_losses, tally.kept_losses, cut))
    moments = {"the pool": tally.pieces.y, "held-out target text": heldout}
    rows: list[list[b.Cell]] = []
    rows.extend([name, of.count, [of.mean, of.std]] for name, of in moments.items() if of.count)
    seen = {"seen by the prior": tally.seen, "not seen": tally.unseen}
    both_seen = all(count for count, _ in seen.values())
    if both_seen:
        rows.extend([name, count, total / count] for name, (count, total) in seen.items())
    columns = {"Scores of": "text", "count": "compact", "mean": "decimals3"}
    means = b.Table(columns, rows, style="short")
    note = "Target text should score higher than the pool: nothing was trained on what is held out."
    if both_seen:
        verb = "were not" if made.candidates.exclude_prior_rows else "were"
        note += f" What the prior has seen of the pool {verb} eligible."
    likeness = f"{intro} The higher the score, the more like the target it is."
    return [b.Text(likeness), b.Group(charts), means, b.Text(note, "note")]


def _examples(ctx: Context, spec: SelectSpec, made: SelectRun) -> list[b.Block]:
    """Texts around the cut and at both ends, with losses, status and address."""
    tokenizer = load_tokenizer(made.tokenizer.path, made.tokenizer.eos_token)
    ranked = made.candidates.ranked(find_rule("selection.rule", spec.rule))
    blocks: list[b.Block] = []
    for group, title, status in _GROUPS:
        cards: list[b.Card] = []
        for score, part, row in made.kept.tally.examples.get(group, []):
            member = ranked[part]
            table = read_table(ctx.store.path(member.tokens.path))
            pieces = read_pieces(table)
            losses = member.read(pieces).losses
            text, source, document = row_texts(table, pieces, row, member.grain, tokenizer)
            facts = [
                b.Fact(f"{name.capitalize()} loss", decimals(float(losses[name][row])))
                for name in ("prior", "conditional")
                if name in losses
            ]
            facts += [b.Fact("Status", status), b.Fact("Document", document)]
            facts.append(b.Fact("Address", f"{member.tokens.path} row {row}"))
            cards.append(b.Card(signed(score, 4), source, text, facts))
        if group == "below" and cards:
            blocks.append(b.Text(f"the cut, {decimals(made.kept.threshold)}", "cut"))
        if cards:
            blocks.append(b.Cards(title, cards, "kept" if group in ("best", "above") else "pool"))
    intro = "From the top of the scale to its bottom. Open one for the whole text and its address."
    return [b.Text(intro), *blocks] if blocks else []


def _targets(rule: str, made: SelectRun, losses: Losses) -> list[b.Block]:
    if not losses:
        return []
    curves = {
        name: [list(map(tuple, m.totals["curve"])) for m in of] for name, of in made.targets.items()
    }
    seeds = max(map(len, losses.values()))
    rows: list[list[b.Cell]] = []
    for name, found in sorted(losses.items(), key=lambda item: fmean(item[1])):
        gaps = gaps_of(losses, name) if name != BASELINE else []
        tokens = made.targets[name][0].totals["num_tokens"]
        rows.append([words(name), tokens, mean_std(found), mean_std(gaps) if gaps else None])
    columns = {"Rule": "text", "tokens": "compact wide", "loss": "decimals3", "vs random": "signed"}
    note = f"Mean ± standard deviation over {seeds} seeds; differences are of paired seeds."
    if seeds == 1:
        note = "One seed, so how much of a difference is chance is not known; "
        note += "`train: {seeds: [0, 1, 2]}` tells."
    caption = f"Loss on held-out target text{'; band: all seeds' if seeds > 1 else ''}"
    table = b.Table(columns, rows, main=words(rule), terminal=True)
    return [
        b.Text(
            "The same model trained from scratch on selections of equal size by different rules, "
            "measured on target text that nothing was trained on. Lower is better."
        ),
        b.Group([b.Curves(caption, curves, rule), table]),
        b.Text(note, "note", terminal=True),
    ]


def _training(trainings: Mapping[str, Mapping[str, Any]]) -> list[b.Block]:
    forms = {"num_tokens": "compact", "num_steps": "compact", "global_batch": "compact"}
    forms |= {"learning_rate": "short", "final_loss": "decimals3"}
    columns = {"Model": "text", **{words(key).removeprefix("num "): f for key, f in forms.items()}}
    rows = [[words(name), *(row[key] for key in forms)] for name, row in trainings.items()]
    note = "The batch is in sequences; the final loss is that of the training's own last step."
    return [b.Table(columns, rows), b.Text(note, "note")] if rows else []


def _paper(spec: SelectSpec, made: SelectRun) -> dict[str, float]:
    """The paper's total costs for this job's m, n, tau and L."""
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
    seen = made.prior.num_tokens
    return {name: paper_cost(name, seen, kept, tau, ratio).total for name in _PAPER_METHODS}


def _paper_cost(paper: Mapping[str, float]) -> list[b.Block]:
    columns = {"Rule": "text", "units": "compact", "vs random": "ratio"}
    rows = [[words(name), total, total / paper[BASELINE]] for name, total in paper.items()]
    note = (
        "A unit is one forward pass of an auxiliary model over one token; a training step counts "
        "three. CoLoR-Filter costs 3m + 2τn + 3nL: the prior on m tokens, two models over a pool "
        "of τn, the target on n, its forward pass L times as expensive."
    )
    table = b.Table(columns, rows, "By the paper's account", main="color filter", style="short")  # type: ignore[arg-type]
    return [table, b.Text(note, "note")] if rows else []
