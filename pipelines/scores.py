"""Scores: one artifact a scorer, its parts beside the token parts, made by a pool of Scorers."""

from dataclasses import dataclass
from functools import partial

from actors.scorer import ScorerHost, ScorerSettings
from pipelines.context import Context
from pipelines.flow import stream_parts
from stillhouse.fingerprint import fingerprint
from stillhouse.selection.scorers import score_task
from stillhouse.storage.artifact import Manifest

UNITS = {
    "causal_lm": ("nats per token", "lower"),
    "dsir": ("log importance weight", "higher"),
    "contamination": ("holds a contaminated document", "lower"),
}


@dataclass(frozen=True, slots=True)
class Scores:
    """A scores artifact; `parts` are paths in the order of the token parts."""

    manifest: Manifest
    num_nan: int

    @property
    def paths(self) -> list[str]:
        """Path of each scores part."""
        return [part.path for part in self.manifest.parts]


def score(
    ctx: Context, step: str, tokens: Manifest, scorer: ScorerSettings, flops_per_token: float = 0
) -> Scores:
    """Run a scorer over every part of a tokens artifact that it has not scored yet."""
    tasks = [score_task(scorer.fingerprint, part) for part in tokens.parts]
    receipts = stream_parts(
        ctx,
        step,
        kind="scores",
        tasks=tasks,
        make=partial(ScorerHost, ctx.store, scorer),
        workers=ctx.compute.scorers,
        gpus=scorer.gpus,
    )
    ctx.work[step].tokens = tokens.num_tokens
    ctx.work[step].flops = flops_per_token * tokens.num_tokens
    unit, better = UNITS[scorer.kind]
    manifest = Manifest(
        kind="scores",
        fingerprint=fingerprint(["scores", [task.fingerprint for task in tasks]]),
        parts=tuple(receipt.parts[0] for receipt in receipts),
        inputs={"tokens": tokens.fingerprint, "scorer": scorer.fingerprint},
        settings={"scorer": scorer.kind, "unit": unit, "better": better}
        | scorer.scoring.model_dump(include={"dtype", "attention"}),
        totals={"nan": sum(receipt.counts["nan"] for receipt in receipts)},
    )
    return Scores(ctx.store.put_manifest(manifest), manifest.totals["nan"])
