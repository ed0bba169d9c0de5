"""`job: select`: its inputs, its pipeline, and what its steps would cost."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from stillhouse.errors import StillhouseError
from stillhouse.jobs.kinds import CHARS_PER_TOKEN, Estimate, Job, Speeds, cost_row
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context, StepWork, Unfinished
from stillhouse.pipelines.given import check_given, given_identity, resolved
from stillhouse.pipelines.inputs import (
    Inputs,
    JobInputs,
    guess_bytes,
    list_job_inputs,
    open_job_inputs,
    scan_tasks,
)
from stillhouse.report.blocks import Result
from stillhouse.selection.carried import check_columns, require_columns
from stillhouse.spec import ModelSettings, SelectionSettings, SelectSpec, TokenizerTraining
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import absolute_uri
from stillhouse.text.tokenizer import load_tokenizer

_PART_BY_PART = (
    *("score prior", "score conditional", "score down", "score"),
    *("contamination", "decontamination"),
)
"""Steps whose old parts stay when a shard is added to the pool."""
_UNCHANGED = ("tokenizer", "train prior", "train conditional", "train down", "fit scorer")
"""Steps that a new shard need not change: pinned, or made from the target."""


class SelectJob(Job):
    """A select job; `given` are digests of what the spec names by path."""

    inputs: JobInputs
    given: list[str | None]

    def __init__(self, spec: SelectSpec) -> None:
        self.spec = resolved(spec, Store(absolute_uri(spec.store)))
        check_given(self.spec)
        self._listing = list_job_inputs(self.spec)
        self.files, exclude = self._listing.all, spec.exclude
        pool = [file.uri for file in self._listing.pool]
        if spec.pool.keep_columns:
            check_columns(self.spec.pool, pool)
        if exclude is not None and exclude.urls is not None:
            require_columns("exclude.url_column", [exclude.url_column], self.spec.pool, pool)

    def open(self, store: Store, *, remember: bool) -> "SelectJob":
        self.inputs = open_job_inputs(store, self.spec, self._listing, remember=remember)
        self.given = given_identity(store, self.spec, remember=remember)
        return self

    def identity(self) -> list[Any]:
        return [self.inputs.identity(), self.given]

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.select import run_select

        return run_select(ctx, self.spec, self.inputs)

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.select_result import select_result

        return select_result(ctx, self.spec, made, run_uri)

    def models(self, made: Any) -> dict[str, Manifest]:
        assert self.spec.train is not None
        seeds = self.spec.train.all_seeds
        return {
            f"{name}, seed {seed}": model
            for name, of in made.targets.items()
            for seed, model in zip(seeds, of, strict=True)
        }

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        """Behind the point that was walked to, tokens are estimated from bytes."""
        steps, new_parts = dict(ctx.work), 0
        packed, new = self._pool_tokens(steps), 0.0
        if not complete and packed is None:
            found, packed, missing = self._walk_packed(ctx)
            new, new_parts = _num_tokens(missing), len(missing.units)
            names = (*_UNCHANGED, *_PART_BY_PART)
            steps = {name: found[name] for name in names if name in found} | steps
            steps |= {"tokens": found["tokens"]} if "tokens" in found else {}
        estimates = _estimates(self.spec, self.inputs, packed or 0.0, new, new_parts)
        return {
            name: cost_row(name, steps.get(name), estimate, speeds, self.spec.compute)
            for name, estimate in estimates.items()
            if not complete or name in steps
        }

    def _pool_tokens(self, steps: dict[str, StepWork]) -> float | None:
        """Tokens of the whole pool, where all of it was found packed."""
        scored = max((steps[n].tokens for n in _PART_BY_PART if n in steps), default=0)
        tokens = steps["tokens"].tokens if "tokens" in steps else 0
        return scored or (max(tokens - _target_tokens(self.inputs), 0.0) if tokens else None)

    def _walk_packed(self, ctx: Context) -> tuple[dict[str, StepWork], float, Inputs]:
        """Walk on behind the scan with the part of the pool that an earlier run packed.

        Returns:
            What was found by step; tokens of that part of the pool; the rest of the pool.
        """
        from stillhouse.pipelines.scan import Scan
        from stillhouse.pipelines.select import run_select
        from stillhouse.pipelines.tokenizer import scanned_tokenizer
        from stillhouse.pipelines.tokens import packed_units

        spec, pool = self.spec, self.inputs.pool
        dry = Context(ctx.store, ctx.compute, ctx.listener, dry=True)
        tasks = scan_tasks(pool)
        try:
            scans = [Scan("pool", pool, tasks, [])]
            tokenizer = scanned_tokenizer(dry, spec.tokenizer, spec.pool.paths, scans)
        except Unfinished:
            return {}, 0.0, pool
        found = packed_units(ctx.store, tokenizer, spec.sequence_length, pool.part_tokens)
        pairs = list(zip(pool.units, tasks, strict=True))
        part = replace(pool, units=tuple(u for u, task in pairs if task.fingerprint in found))
        rest = replace(pool, units=tuple(u for u, task in pairs if task.fingerprint not in found))
        tokens = sum(found[t.fingerprint].num_tokens for t in tasks if t.fingerprint in found)
        if part.units:
            packed = {name: unit.dropped for name, unit in found.items()}
            dry = Context(ctx.store, ctx.compute, ctx.listener, dry=True, packed=packed)
            # a selection that no pool is too small for, with the same steps before the cut
            selection = SelectionSettings(
                min_score=0.0,
                exclude_contaminated=spec.selection.exclude_contaminated,
                grain=spec.selection.grain,
            )
            any_size = spec.model_copy(update={"selection": selection})
            with suppress(Unfinished, StillhouseError):  # how far it came is in `dry.work`
                run_select(dry, any_size, replace(self.inputs, pool=part))
        return dry.work, tokens, rest


def _estimates(
    spec: SelectSpec, inputs: JobInputs, packed: float, new: float, new_parts: int
) -> dict[str, Estimate]:
    """What each step reads or makes, where `packed` tokens of the pool exist, `new` do not yet."""
    target, pool = _target_tokens(inputs), packed + new
    model, trained = _model_flops(spec)
    conditional = spec.conditional.num_tokens or spec.conditional.epochs * target
    scoring = Estimate(packed, new, model, new_parts)
    steps: dict[str, Estimate] = {
        "scan": Estimate(pool + target),
        "tokenizer": Estimate(0),
        **dict.fromkeys(("hashes", "duplicates", "drops"), Estimate(0)),
        "tokens": Estimate(packed + target, new, new_parts=new_parts),
    }
    if spec.scorer is not None:
        steps["fit scorer"] = Estimate(min(spec.scorer.num_tokens, pool))
        steps["score"] = replace(scoring, flops_per_token=0)
    else:
        if spec.prior.path is None:
            steps["train prior"] = Estimate(min(spec.prior.num_tokens, pool), flops_per_token=model)
        if spec.conditional.path is None:
            steps["train conditional"] = Estimate(conditional, flops_per_token=model)
        steps["score prior"] = steps["score conditional"] = scoring
    controls = spec.train.controls if spec.train else []
    if "rho_down" in controls:
        steps["train down"] = Estimate(conditional, flops_per_token=model)
        steps["score down"] = scoring
    if "dsir" in controls:
        steps["score dsir"] = Estimate(pool)
    selection = spec.selection
    if selection.exclude_contaminated:
        steps["contamination"] = replace(scoring, flops_per_token=0)
    if spec.decontaminate:
        steps["decontamination"] = replace(scoring, flops_per_token=0)
    if spec.exclude is not None:
        steps["take down"] = Estimate(pool)
    size = pool * selection.fraction if selection.fraction else pool / (selection.tau or 1)
    kept = selection.num_tokens or size
    steps["selection"] = Estimate(kept)
    steps |= {f"control {rule}": Estimate(kept) for rule in controls}
    if spec.train is not None:
        runs = len(spec.train.all_seeds) * (1 + len(controls))
        tokens = runs * (spec.train.num_tokens or kept)
        steps["train targets"] = Estimate(tokens, flops_per_token=trained)
    return steps


def _target_tokens(inputs: JobInputs) -> float:
    """Of all targets, estimated from bytes."""
    return sum(_num_tokens(one) for one in inputs.targets.values())


def _num_tokens(inputs: Inputs) -> float:
    """Tokens in the units of a source, estimated from bytes."""
    num_bytes = 0.0
    for part in (part for unit in inputs.units for part in unit.ranges):
        file = inputs.files[part.file]
        rows = sum(file.piece_rows or ())
        share = (part.rows[1] - part.rows[0]) / rows if part.rows and rows else 1.0
        num_bytes += share * guess_bytes([file])
    return num_bytes / CHARS_PER_TOKEN


def _model_flops(spec: SelectSpec) -> tuple[float | None, float]:
    """FLOPs of a forward pass for one token, of the scoring models and of the target model.

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
