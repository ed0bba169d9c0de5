"""CoLoR-Filter end to end: score a pool with two models, keep what the target gains most from.

Every step's result is an artifact named by what it was made from, so a step whose inputs did not
change is found, not done again.
"""

from dataclasses import dataclass

from pipelines.candidates import (
    Candidates,
    candidates_of,
    excludes_prior_rows,
    labels_for_shares,
)
from pipelines.context import Context
from pipelines.inputs import JobInputs
from pipelines.models import ModelRef, Models
from pipelines.scan import Scanned, scan
from pipelines.scores import PoolScores
from pipelines.selection import Selected, check_size, select, size_of
from pipelines.tokenizer import tokenizer
from pipelines.tokens import Tokenised, TokenizerRef, tokenise, without_dropped
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest


@dataclass(frozen=True, slots=True)
class SelectRun:
    """Everything that a select job made."""

    scanned: Scanned
    tokenizer: TokenizerRef
    pool: Tokenised
    target: Tokenised
    heldout: Tokenised
    prior: ModelRef
    conditional: ModelRef
    candidates: Candidates
    selections: dict[str, Selected]
    targets: dict[str, list[Manifest]]


def run_select(ctx: Context, spec: SelectSpec, inputs: JobInputs) -> SelectRun:
    """Documents -> tokens -> prior -> conditional -> scores -> exact cut -> selection -> targets.

    Raises:
        StillhouseError: whatever a step raises; run again to go on from its finished parts.
    """
    scanned = scan(ctx, inputs)
    words = tokenizer(ctx, spec, scanned.sources[0])
    packing = without_dropped(ctx, spec, scanned.sources, words)
    pool, target, heldout = tokenise(ctx, spec, packing, words)
    check_size(pool.manifest, spec.selection)
    sources = labels_for_shares(ctx, spec, pool.manifest)

    models = Models(ctx, spec, words)
    prior = models.prior(pool.manifest)
    seen = models.prior_rows(prior, pool.manifest)
    if excludes_prior_rows(spec, pool.manifest, seen):
        check_size(pool.manifest, spec.selection, hidden=sum(map(len, seen.values())))
    conditional = models.conditional(prior, target.manifest)

    scoring = PoolScores(ctx, spec, words, pool.manifest)
    scores = {
        "prior": scoring.losses("prior", prior),
        "conditional": scoring.losses("conditional", conditional),
    }
    controls = spec.train.controls if spec.train else []
    if "rho_down" in controls:
        scores["down"] = scoring.losses("down", models.down(prior, target.manifest))
    if "dsir" in controls:
        scores["dsir"] = scoring.dsir(packing[1].tasks)
    contamination = scoring.contamination(packing[2].tasks)

    candidates = candidates_of(
        ctx, spec, pool, scores, contamination, prior.fingerprint, seen, sources
    )
    kept = select(ctx, spec, candidates)
    size = size_of(kept, spec.selection)
    selections = {"color": kept}
    for rule in controls:
        selections[rule] = select(ctx, spec, candidates, rule=rule, size=size)
    kept_by = {name: made.manifest for name, made in selections.items()}
    targets = models.targets(kept_by, heldout.manifest) if spec.train else {}
    return SelectRun(
        scanned=scanned,
        tokenizer=words,
        pool=pool,
        target=target,
        heldout=heldout,
        prior=prior,
        conditional=conditional,
        candidates=candidates,
        selections=selections,
        targets=targets,
    )
