"""CoLoR-Filter end to end: score a pool with two models, keep what the target gains most from.

A scorer of the user's may stand for the two models.

Every step's result is an artifact named by what it was made from, so a step whose inputs did not
change is found, not done again.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import SpecError
from stillhouse.pipelines.candidates import (
    Candidates,
    PoolSources,
    candidates_of,
)
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import ModelRef, Needs, given_models, given_paths
from stillhouse.pipelines.inputs import JobInputs
from stillhouse.pipelines.models import Models
from stillhouse.pipelines.scan import Scanned, scan
from stillhouse.pipelines.scores import PoolScores
from stillhouse.pipelines.selection import (
    Selected,
    check_shares,
    check_size,
    check_size_beside_prior,
    select,
    size_of,
)
from stillhouse.pipelines.tokenizer import tokenizer
from stillhouse.pipelines.tokens import Tokenised, TokenizerRef, tokenise, without_dropped
from stillhouse.selection.own import find_code
from stillhouse.selection.rules import NamedRule, find_rule
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Manifest
from stillhouse.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class SelectRun:
    """Everything that a select job made."""

    scanned: Scanned
    tokenizer: TokenizerRef
    pool: Tokenised
    target: Tokenised
    heldout: Tokenised
    prior: ModelRef | None
    conditional: ModelRef | None
    """None where a scorer of the user's stands for both models."""
    candidates: Candidates
    selections: dict[str, Selected]
    """By rule; the job's own first."""
    targets: dict[str, list[Manifest]]
    trained: dict[str, Manifest]
    """Auxiliary models that the job trained itself, by role."""

    @property
    def kept(self) -> Selected:
        """What the job is for; the others are controls."""
        return next(iter(self.selections.values()))


def run_select(ctx: Context, spec: SelectSpec, inputs: JobInputs) -> SelectRun:
    """Documents -> tokens -> prior -> conditional -> scores -> exact cut -> selection -> targets.

    Raises:
        StillhouseError: whatever a step raises; run again to go on from its finished parts.
    """
    rules = rules_of(spec)
    needed = {name for rule in rules for name in rule.scorers}
    given = _given(ctx, spec)
    scanned = scan(ctx, inputs)
    words = tokenizer(ctx, spec, scanned.sources[0])
    packing = without_dropped(ctx, spec, scanned.sources, words)
    pool, target, heldout = tokenise(ctx, spec.sequence_length, packing, words)
    check_size(pool.manifest, spec.selection)
    sources = PoolSources(ctx, spec, pool.manifest)
    check_shares(sources, pool.manifest, spec.selection)

    models = Models(ctx, spec, words, given)
    scoring = PoolScores(ctx, spec, words, pool.manifest, heldout.manifest)
    prior = conditional = down = None
    seen: dict[str, NDArray[np.int64]] = {}
    if spec.scorer is not None:
        code = find_code(spec.scorer.import_)
        scores = {"own": scoring.own(code, packing[1].tasks)}
    else:
        check = partial(check_size_beside_prior, spec, pool.manifest)
        with models:
            prior = models.prior(pool.manifest, check)
            seen = models.prior_rows(prior, pool.manifest)
            check(sum(map(len, seen.values())))
            conditional = models.conditional(prior, target.manifest)
            if "down" in needed:
                down = models.down(prior, target.manifest)
        scores = {
            "prior": scoring.losses("prior", prior),
            "conditional": scoring.losses("conditional", conditional),
        }
        if down is not None:
            scores["down"] = scoring.losses("down", down)
    if "dsir" in needed:
        scores["dsir"] = scoring.dsir(packing[1].tasks)
    contamination = scoring.contamination(packing[2].tasks)

    name = prior.folder.removeprefix(f"{ctx.store.uri}/") if prior is not None else ""
    candidates = candidates_of(ctx, spec, pool, scores, contamination, name, seen, sources, words)
    kept = select(ctx, spec, candidates, rule=rules[0])
    size = size_of(kept, spec.selection)
    selections: dict[str, Selected] = {spec.rule: kept}
    for rule in rules[1:]:
        selections[rule.name] = select(ctx, spec, candidates, rule=rule, size=size)
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
        trained=models.trained,
    )


def rules_of(spec: SelectSpec) -> list[NamedRule]:
    """The rule of the selection, then those of the controls.

    Raises:
        SpecError: no such rule, or one that reads what the job has no scorer for.
    """
    controls = spec.train.controls if spec.train else []
    rules = [find_rule("selection.rule", spec.rule)]
    rules += [find_rule("train.controls", name) for name in controls]
    absent = {"own"} if spec.scorer is None else {"prior", "conditional", "down"}
    for rule in rules:
        if missing := sorted(absent & {*rule.scorers}):
            raise SpecError(
                f"the rule `{rule.name}` reads `{missing[0]}`, which this job does not have: "
                "give `prior` and `conditional`, or a `scorer`, as the rule needs"
            )
        if "dsir" in rule.scorers and spec.selection.grain == "documents":
            raise SpecError(
                f"the rule `{rule.name}` ranks sequences: use `selection.grain: sequences`"
            )
    return rules


def _given(ctx: Context, spec: SelectSpec) -> dict[str, ModelRef]:
    """The models that the spec gives by path, in the store; they fit tokenizer and sequences."""
    paths, asked = given_paths(spec), spec.tokenizer
    if not paths or asked.path is None:
        return {}
    words = load_tokenizer(asked.path, asked.eos_token)
    num_positions = spec.sequence_length + int(words.bos_id(asked.bos) is not None)
    return given_models(ctx, paths, Needs(words.vocab_size, num_positions, comparable=True))
