"""What the steps of a select job would cost: tokens guessed from bytes, speeds from a probe."""

from typing import Any

from stillhouse.jobs.probe import probe
from stillhouse.pipelines.context import StepWork
from stillhouse.pipelines.inputs import JobInputs
from stillhouse.spec import ModelSettings, SelectSpec, TokenizerTraining

CHARS_PER_TOKEN = 3.5
_PACKED_SIZE = {".parquet": 2.5, ".gz": 3.5, ".zst": 3.5}
"""Bytes of text in a stored byte, roughly."""


def estimate_steps(
    spec: SelectSpec, inputs: JobInputs, known: dict[str, StepWork], *, complete: bool
) -> dict[str, dict[str, Any]]:
    """See `stillhouse.jobs.kinds.Opened.estimate`; `known` is what a dry walk found."""
    scored = known.get("score prior") or known.get("score")
    tokens = scored.tokens if scored else _guess_tokens(inputs)
    steps: dict[str, dict[str, Any]] = {}
    speeds = _probe(spec)
    for name, (amount, model, passes) in _amounts(spec, inputs, tokens).items():
        work = known.get(name)
        if work is None and complete:
            continue
        flops = passes * amount * (speeds[model][1] if model else 0)
        done = work is not None and work.reused == work.parts
        rate = speeds[model][0 if passes == 1 else 2] if model else None
        width = spec.compute.scorers if passes == 1 else spec.compute.trainers
        steps[name] = {
            "parts": work.parts if work else None,
            "reused": work.reused if work else 0,
            "tokens": round(amount),
            "flops": flops,
            "seconds": 0.0 if done else amount / rate / width if rate else None,
        }
    return steps


def _amounts(
    spec: SelectSpec, inputs: JobInputs, tokens: float
) -> dict[str, tuple[float, str, int]]:
    """By step: tokens, which model (if any) sees them, forward passes a token (3 in training)."""
    target = guess_bytes(inputs.target.files) / CHARS_PER_TOKEN
    conditional = spec.conditional.num_tokens or spec.conditional.epochs * target
    steps: dict[str, tuple[float, str, int]] = {
        "scan": (tokens + target, "", 0),
        "tokenizer": (0, "", 0),
        "duplicates": (0, "", 0),
        "tokens": (tokens + target, "", 0),
    }
    if spec.scorer is not None:
        steps["fit scorer"] = (min(spec.scorer.num_tokens, tokens), "", 0)
        steps["score"] = (tokens, "", 0)
    elif spec.prior.path is None:
        steps["train prior"] = (min(spec.prior.num_tokens, tokens), "prior", 3)
    if spec.scorer is None:
        if spec.conditional.path is None:
            steps["train conditional"] = (conditional, "prior", 3)
        steps["score prior"] = steps["score conditional"] = (tokens, "prior", 1)
    controls = spec.train.controls if spec.train else []
    if "rho_down" in controls:
        steps["train down"] = (conditional, "prior", 3)
        steps["score down"] = (tokens, "prior", 1)
    if "dsir" in controls:
        steps["score dsir"] = (tokens, "", 0)
    if spec.selection.exclude_contaminated:
        steps["contamination"] = (tokens, "", 0)
    kept = _guess_kept(spec, tokens)
    steps["selection"] = (kept, "", 0)
    steps |= {f"control {rule}": (kept, "", 0) for rule in controls}
    if spec.train is not None:
        runs = len(spec.train.all_seeds) * (1 + len(controls))
        steps["train targets"] = (runs * (spec.train.num_tokens or kept), "target", 3)
    return steps


def _guess_kept(spec: SelectSpec, tokens: float) -> float:
    settings = spec.selection
    if settings.num_tokens is not None:
        return settings.num_tokens
    if settings.fraction is not None:
        return tokens * settings.fraction
    return tokens / settings.tau if settings.tau is not None else tokens


def _guess_tokens(inputs: JobInputs) -> float:
    return guess_bytes(inputs.pool.files) / CHARS_PER_TOKEN


def guess_bytes(files: Any) -> float:
    """Bytes of text in files, roughly."""
    total = 0.0
    for file in files:
        factor = [f for end, f in _PACKED_SIZE.items() if file.uri.lower().endswith(end)]
        total += file.size_bytes * (factor[0] if factor else 1)
    return total


def _probe(spec: SelectSpec) -> dict[str, tuple[float, float, float]]:
    """By model: scoring tokens/s of one worker, FLOPs a token, training tokens/s of one worker."""
    speeds = {"": (0.0, 0.0, 0.0), "prior": (0.0, 0.0, 0.0)}  # of a given one nothing is known
    prior = None if spec.prior.path else spec.prior.model or ModelSettings()
    if spec.scorer is None and prior is not None:
        speeds["prior"] = _speeds(spec, prior)
    if spec.train is not None:
        same = spec.scorer is None and spec.train.model == prior
        speeds["target"] = speeds["prior"] if same else _speeds(spec, spec.train.model)
    return speeds


def _speeds(spec: SelectSpec, model: ModelSettings) -> tuple[float, float, float]:
    vocab = (spec.tokenizer.train or TokenizerTraining()).vocab_size
    found = probe(model, vocab, spec.sequence_length, spec.prior, spec.compute, spec.scoring.dtype)
    return found.scoring, found.flops_per_token, found.training
