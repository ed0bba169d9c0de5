"""CoLoR-Filter end to end: score a pool with two models, keep what the target gains most from.

A user's scorer may replace the two models. Every step's result is an artifact named by what it was
made from, so a step whose inputs did not change is found, not done again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.pipelines.candidates import Candidates, PackedPool
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.duplicates import Drops
from stillhouse.pipelines.given import ModelRef, Needs, given_models, given_paths
from stillhouse.pipelines.inputs import JobInputs
from stillhouse.pipelines.models import Models
from stillhouse.pipelines.scan import ScannedJob, scan
from stillhouse.pipelines.scores import PoolScores
from stillhouse.pipelines.selection import Selected, select
from stillhouse.pipelines.takedown import take_down
from stillhouse.pipelines.tokenizer import scanned_tokenizer
from stillhouse.pipelines.tokens import (
    Tokenised,
    TokenizerRef,
    pack_tasks,
    together,
    tokenise_job,
    without_dropped,
)
from stillhouse.selection.contamination import files_of
from stillhouse.selection.own import find_code
from stillhouse.selection.rules import rules_of
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest
from stillhouse.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class SelectRun:
    """Everything that a select job made.

    Attributes:
        domains: the target's, by their keys in the spec.
        target, heldout: of all of them together.
        prior, conditional: None where a user's scorer replaces both models.
        benchmarks: their files, in the order of their numbers.
        selections: by rule; the job's own first, then the controls.
        trained: auxiliary models that the job trained itself, by role.
    """

    scanned: ScannedJob
    tokenizer: TokenizerRef
    pool: Tokenised
    domains: dict[str, Tokenised]
    target: Tokenised
    heldout: Tokenised
    prior: ModelRef | None
    conditional: ModelRef | None
    candidates: Candidates
    benchmarks: list[str]
    selections: dict[str, Selected]
    targets: dict[str, list[Manifest]]
    trained: dict[str, Manifest]

    @property
    def kept(self) -> Selected:
        """The job's own selection."""
        return next(iter(self.selections.values()))


def run_select(ctx: Context, spec: SelectSpec, inputs: JobInputs) -> SelectRun:
    """Documents -> tokens -> prior -> conditional -> scores -> exact cut -> selection -> targets.

    Raises:
        StillhouseError: whatever a step raises; run again to go on from its finished parts.
    """
    rules = rules_of(spec)
    scorers = {name for rule in rules for name in rule.scorers}
    given = _given(ctx, spec)
    scanned = scan(ctx, inputs)
    tokenizer = scanned_tokenizer(ctx, spec.tokenizer, spec.pool.paths, [scanned.pool])
    packings = without_dropped(ctx, spec, scanned, tokenizer)
    benchmarks = [
        task
        for one in scanned.benchmarks
        for task in pack_tasks(ctx.store, one, Drops(), tokenizer, spec.sequence_length)
    ]
    pool, domains, heldout = tokenise_job(ctx, spec.sequence_length, packings, tokenizer)
    target = together(ctx.store, [*domains.values()])
    target_tasks = [task for one in packings.targets.values() for task in one.tasks]
    heldout_tasks = [task for one in packings.heldouts.values() for task in one.tasks]
    packed = PackedPool(ctx, spec, pool)
    packed.check_size()
    packed.check_shares()

    models = Models(ctx, spec, tokenizer, given)
    scoring = PoolScores(ctx, spec, tokenizer, pool.manifest, heldout.manifest)
    prior = conditional = down = None
    prior_rows: dict[str, NDArray[np.int64]] = {}
    if spec.scorer is not None:
        code = find_code(spec.scorer.import_)
        scores = {"own": scoring.own(code, target_tasks)}
    else:
        with models:
            prior = models.prior(pool.manifest, packed.check_size)
            prior_rows = models.prior_rows(prior, pool.manifest)
            packed.check_size(sum(map(len, prior_rows.values())))
            tuned_on = {key: one.manifest for key, one in domains.items()}
            conditional = models.conditional(prior, tuned_on)
            if "down" in scorers:
                down = models.down(prior, tuned_on)
        scores = {
            "prior": scoring.losses("prior", prior),
            "conditional": scoring.losses("conditional", conditional),
        }
        if down is not None:
            scores["down"] = scoring.losses("down", down)
    if "dsir" in scorers:
        scores["dsir"] = scoring.dsir(target_tasks)

    candidates = Candidates(
        spec=spec,
        pool=packed,
        tokenizer=tokenizer,
        scores=scores,
        contamination=scoring.contamination(heldout_tasks),
        benchmarks=scoring.decontamination(benchmarks),
        takedown=take_down(ctx, inputs.takedown, scanned.pool, pool.manifest, spec.selection.grain),
        prior_rows=prior_rows,
        prior_model=prior.folder.removeprefix(f"{ctx.store.uri}/") if prior is not None else "",
    )
    kept = select(ctx, candidates, rules[0])
    documents = spec.selection.grain == "documents"
    size = kept.manifest.num_tokens if documents else kept.manifest.num_rows
    selections = {spec.rule: kept}
    selections |= {rule.name: select(ctx, candidates, rule, size) for rule in rules[1:]}
    manifests = {name: selected.manifest for name, selected in selections.items()}
    targets = models.targets(manifests, heldout.manifest) if spec.train else {}
    return SelectRun(
        scanned=scanned,
        tokenizer=tokenizer,
        pool=pool,
        domains=domains,
        target=target,
        heldout=heldout,
        prior=prior,
        conditional=conditional,
        candidates=candidates,
        benchmarks=[*files_of(benchmarks).values()],
        selections=selections,
        targets=targets,
        trained=models.trained,
    )


def _given(ctx: Context, spec: SelectSpec) -> dict[str, ModelRef]:
    """The models that the spec gives by path, checked to fit tokenizer and sequences."""
    paths, asked = given_paths(spec), spec.tokenizer
    if not paths or asked.path is None:
        return {}
    tokenizer = load_tokenizer(asked.path, asked.eos_token)
    num_positions = spec.sequence_length + int(tokenizer.bos_id(asked.bos) is not None)
    return given_models(ctx, paths, Needs(tokenizer.vocab_size, num_positions, comparable=True))
