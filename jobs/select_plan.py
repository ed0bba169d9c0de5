"""What the steps of a select job would cost: what is there is counted, the rest guessed."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from stillhouse.errors import StillhouseError
from stillhouse.jobs.costs import Estimate, cost_row, speeds_of
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context, StepWork, Unfinished
from stillhouse.pipelines.inputs import Inputs, JobInputs, guess_bytes, scan_tasks
from stillhouse.pipelines.scan import Scan
from stillhouse.pipelines.tokens import packed_units
from stillhouse.spec import ModelSettings, SelectionSettings, SelectSpec, TokenizerTraining
from stillhouse.text.tokenizer import load_tokenizer

CHARS_PER_TOKEN = 3.5
_OF_THE_POOL = ("score prior", "score conditional", "score down", "score", "contamination")
"""Steps that go on part by part: old parts stay when a shard is added."""
_KEPT = ("tokenizer", "train prior", "train conditional", "train down", "fit scorer")
"""Steps that a new shard need not change: pinned, or made from the target."""


def estimate_steps(
    spec: SelectSpec, inputs: JobInputs, ctx: Context, *, complete: bool
) -> dict[str, dict[str, Any]]:
    """See `stillhouse.jobs.kinds.Opened.estimate`."""
    known, coming = dict(ctx.work), 0
    packed, new = _pool_tokens(known, inputs), 0.0
    if not complete and packed is None:
        found, tokens, missing = _look_on(ctx, spec, inputs)
        coming = len(missing.units)
        packed, new = tokens, _guess(missing)
        known = {name: found[name] for name in (*_KEPT, *_OF_THE_POOL) if name in found} | known
        known |= {"tokens": found["tokens"]} if "tokens" in found else {}
    amounts = _amounts(spec, inputs, packed or 0.0, new, coming)
    speeds = speeds_of(ctx.store)
    return {
        name: cost_row(name, known.get(name), amount, speeds, spec.compute)
        for name, amount in amounts.items()
        if not complete or name in known
    }


def _pool_tokens(known: dict[str, StepWork], inputs: JobInputs) -> float | None:
    """Tokens of the whole pool, where all of it was found packed."""
    scored = max((known[n].tokens for n in _OF_THE_POOL if n in known), default=0)
    tokens = known["tokens"].tokens if "tokens" in known else 0
    return scored or (max(tokens - _guess(inputs.target), 0.0) if tokens else None)


def _look_on(
    ctx: Context, spec: SelectSpec, inputs: JobInputs
) -> tuple[dict[str, StepWork], float, Inputs]:
    """Walk behind the scan with the part of the pool that an earlier run packed.

    Returns:
        What was found by step; tokens of that part of the pool; the rest of the pool.
    """
    from stillhouse.pipelines.select import run_select
    from stillhouse.pipelines.tokenizer import scanned_tokenizer

    look = Context(ctx.store, ctx.compute, ctx.listener, dry=True)
    tasks = scan_tasks(inputs.pool)
    try:
        scans = [Scan("pool", inputs.pool, tasks, [])]
        words = scanned_tokenizer(look, spec.tokenizer, spec.pool.paths, scans)
    except Unfinished:
        return {}, 0.0, inputs.pool
    found = packed_units(ctx.store, words, spec.sequence_length, inputs.pool.part_tokens)
    there = [task.fingerprint in found for task in tasks]
    units = list(zip(inputs.pool.units, there, strict=True))
    part = replace(inputs.pool, units=tuple(unit for unit, known in units if known))
    rest = replace(inputs.pool, units=tuple(unit for unit, known in units if not known))
    tokens = sum(found[task.fingerprint].num_tokens for task in tasks if task.fingerprint in found)
    if part.units:
        packed = {name: unit.dropped for name, unit in found.items()}
        look = Context(ctx.store, ctx.compute, ctx.listener, dry=True, packed=packed)
        whole = spec.model_copy(update={"selection": _whole(spec)})
        with suppress(Unfinished, StillhouseError):  # what it got to know is in `look.work`
            run_select(look, whole, replace(inputs, pool=part))
    return look.work, tokens, rest


def _whole(spec: SelectSpec) -> SelectionSettings:
    """A selection that no pool is too small for, of the same steps before the cut."""
    asked = spec.selection
    return SelectionSettings(
        min_score=0.0, exclude_contaminated=asked.exclude_contaminated, grain=asked.grain
    )


def _amounts(
    spec: SelectSpec, inputs: JobInputs, packed: float, new: float, coming: int
) -> dict[str, Estimate]:
    """What each step reads or makes; `packed` tokens of the pool are there, `new` to come."""
    target = _guess(inputs.target)
    model, trained = _model_flops(spec)
    conditional = spec.conditional.num_tokens or spec.conditional.epochs * target
    scoring = Estimate(packed, new, model, coming)
    steps: dict[str, Estimate] = {
        "scan": Estimate(packed + new + target),
        "tokenizer": Estimate(0),
        "duplicates": Estimate(0),
        "tokens": Estimate(packed + target, new, new_parts=coming),
    }
    pool = packed + new
    if spec.scorer is not None:
        steps["fit scorer"] = Estimate(min(spec.scorer.num_tokens, pool))
        steps["score"] = replace(scoring, flops_per_token=0)
    elif spec.prior.path is None:
        steps["train prior"] = Estimate(min(spec.prior.num_tokens, pool), flops_per_token=model)
    if spec.scorer is None:
        if spec.conditional.path is None:
            steps["train conditional"] = Estimate(conditional, flops_per_token=model)
        steps["score prior"] = steps["score conditional"] = scoring
    controls = spec.train.controls if spec.train else []
    if "rho_down" in controls:
        steps["train down"] = Estimate(conditional, flops_per_token=model)
        steps["score down"] = scoring
    if "dsir" in controls:
        steps["score dsir"] = Estimate(pool)
    if spec.selection.exclude_contaminated:
        steps["contamination"] = replace(scoring, flops_per_token=0)
    kept = _guess_kept(spec, pool)
    steps["selection"] = Estimate(kept)
    steps |= {f"control {rule}": Estimate(kept) for rule in controls}
    if spec.train is not None:
        runs = len(spec.train.all_seeds) * (1 + len(controls))
        tokens = runs * (spec.train.num_tokens or kept)
        steps["train targets"] = Estimate(tokens, flops_per_token=trained)
    return steps


def _guess_kept(spec: SelectSpec, tokens: float) -> float:
    settings = spec.selection
    if settings.num_tokens is not None:
        return settings.num_tokens
    if settings.fraction is not None:
        return tokens * settings.fraction
    return tokens / settings.tau if settings.tau is not None else tokens


def _guess(inputs: Inputs) -> float:
    """Tokens in the units of a source, roughly."""
    sizes = 0.0
    for part in (part for unit in inputs.units for part in unit.ranges):
        file = inputs.files[part.file]
        rows = sum(file.row_group_rows or ())
        share = (part.rows[1] - part.rows[0]) / rows if part.rows and rows else 1.0
        sizes += share * guess_bytes([file])
    return sizes / CHARS_PER_TOKEN


def _model_flops(spec: SelectSpec) -> tuple[float | None, float]:
    """FLOPs of a forward pass for one token, of the scoring models and of the target.

    None for given models: what they cost is counted where they are loaded.
    """
    if spec.tokenizer.path is not None:
        vocab = load_tokenizer(spec.tokenizer.path, spec.tokenizer.eos_token).vocab_size
    else:
        vocab = (spec.tokenizer.train or TokenizerTraining()).vocab_size
    length = spec.sequence_length

    def planned(model: ModelSettings) -> float:
        return planned_shape(model, vocab, length).flops_per_token(length)

    model: float | None = 0.0
    if spec.scorer is None:
        given = spec.prior.path is not None
        model = None if given else planned(spec.prior.model or ModelSettings())
    return model, planned(spec.train.model) if spec.train is not None else 0.0
