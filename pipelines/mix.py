"""Mixing: arms -> Mixer actor -> training workers -> rewards -> Mixer; a model for each run.

A job's runs (the policy and its controls, with every seed) follow each other in the same workers;
one that is in the store already is not run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from uuid import uuid4

from stillhouse.actors.mixer import MixerActor, RemoteMixer
from stillhouse.errors import SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.doremi import DoReMiSettings
from stillhouse.mixing.mixer import MixerTask
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import PolicySettings
from stillhouse.mixing.spec import MixSpec, control_settings, controls_fault
from stillhouse.mixing.task import MIX_VERSION, MixTask
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import Needs, check_vocabulary, given_models
from stillhouse.pipelines.mix_data import (
    ArmsMade,
    GivenModels,
    MixInputs,
    given_paths,
    prepare_arms,
)
from stillhouse.pipelines.workers import STEP, run_workers
from stillhouse.spec import ModelSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tokenizer import load_tokenizer

_MODEL_KEYS = {"kind", "path"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy or control of the job: how many micro-batches, passes and steps it has."""

    label: str
    settings: PolicySettings
    plan: StepPlan
    slots: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class MixRun:
    """Everything that a mix job made; `models` by label and seed."""

    arms: ArmsMade
    rules: tuple[Rule, ...]
    models: dict[str, dict[int, Manifest]]


def run_mix_job(
    ctx: Context, spec: MixSpec, inputs: MixInputs, given: GivenModels, decisions: str
) -> MixRun:
    """Prepare the arms and train every run.

    Args:
        ctx: the run.
        spec: the job.
        inputs: what it reads.
        given: content of given models, for identities.
        decisions: URI of the folder under which logs are written.

    Raises:
        StillhouseError: whatever stopped it; run again to go on from the last checkpoint.
    """
    asked = spec.tokenizer
    size = 0 if asked.path is None else load_tokenizer(asked.path, asked.eos_token).vocab_size
    needs = Needs(vocab_size=size, encoder_decoder=spec.model.kind == "encoder_decoder")
    placed = given_models(ctx, given_paths(spec), needs)
    given = replace(given, folders={key: model.folder for key, model in placed.items()})
    arms = prepare_arms(ctx, spec, inputs)
    if spec.reference is not None:
        words = load_tokenizer(arms.tokenizer.path, arms.tokenizer.eos_token)
        check_vocabulary(words, arms.tokenizer.path, {"policy": spec.reference})
    rules = rules_of(spec, [part.num_rows for part in arms.arms])
    tasks = [
        mix_task(spec, arms, rule, seed, given, decisions) for seed in spec.seeds for rule in rules
    ]
    made = train_mixes(ctx, tasks)
    models: dict[str, dict[int, Manifest]] = {rule.label: {} for rule in rules}
    for task, manifest in zip(tasks, made, strict=True):
        models[task.label][task.seed] = manifest
    return MixRun(arms, tuple(rules), models)


def rules_of(spec: MixSpec, sizes: Sequence[int]) -> list[Rule]:
    """The policy, and its controls with as many gradient passes.

    A control has the policy's passes in every step, and as many steps as the policy's initial pass
    over the arms would have made.

    Raises:
        SpecError: a replay that does not fit its log, or whose controls would draw nothing.
    """
    train, batches = spec.train, spec.target_batches
    plan, slots = spec.policy.plan(batches), train.accumulation
    first = Rule(spec.policy.name, spec.policy, plan, slots, train.num_steps)
    rules, each = [first], plan.passes(slots)
    fault = controls_fault(spec, each)
    if fault is not None:
        raise SpecError(fault)
    budget = each * train.num_steps + _initial_passes(spec, spec.policy, sizes)
    for name in spec.controls:
        settings = control_settings(name, spec.policy)
        plan = settings.plan(batches)
        steps = max(1, (budget - _initial_passes(spec, settings, sizes)) // each)
        if name == "target_only":
            rules.append(Rule(name, settings, StepPlan(each), 0, steps))
        else:
            rules.append(Rule(name, settings, plan, each - plan.passes(0), steps))
    return rules


def _initial_passes(spec: MixSpec, settings: PolicySettings, sizes: Sequence[int]) -> int:
    if not settings.needs_initial_pass:
        return 0
    examples: int = getattr(settings, "initial_examples", 0)
    batch = spec.train.micro_batch
    return sum(-(-min(examples, size) // batch) for size in sizes) + spec.target_batches


def mix_task(
    spec: MixSpec,
    arms: ArmsMade,
    rule: Rule,
    seed: int,
    given: GivenModels,
    decisions: str,
) -> MixTask:
    """A run as plain values, named by all that decides its model."""
    train = spec.train
    sizes = tuple(part.num_rows for part in arms.arms)
    settings = rule.settings.identity()
    if spec.reference is not None:
        settings["reference"] = given.reference
    identity: dict[str, Any] = {
        "policy": settings,
        "seed": seed,
        "plan": [rule.slots, rule.num_steps, rule.plan.target_batches],
        "train": train.model_dump(mode="json"),
        "model": spec.model.model_dump(mode="json", exclude={"path"})
        if given.init is None
        else given.init,
        "data": {
            "arms": [[a.name, d] for a, d in zip(arms.arms, arms.digests, strict=True)],
            "target": arms.target,
            "num_shots": spec.target.num_shots,
        },
        "tokenizer": arms.tokenizer.digest,
    }
    bos_id = arms.tokenizer.bos_id if spec.model.kind == "decoder" else None
    if bos_id is not None:
        identity["bos_id"] = bos_id
    regime = {
        "policy": rule.label,
        "seed": seed,
        "slots": rule.slots,
        "micro_batch": train.micro_batch,
        "target_batches": rule.plan.target_batches,
        "weighted": rule.settings.weights_losses,
    }
    mixer = MixerTask(
        settings=rule.settings,
        arms=tuple(part.name for part in arms.arms),
        sizes=sizes,
        slots=rule.slots,
        seed=seed,
        log=f"{decisions}/{rule.label}-{seed}",
        log_every=spec.log_every,
        regime=regime,
    )
    compares = isinstance(rule.settings, DoReMiSettings)
    fresh = ModelSettings(**spec.model.model_dump(exclude=_MODEL_KEYS))
    return MixTask(
        fingerprint=fingerprint(["mix", MIX_VERSION, identity]),
        label=rule.label,
        seed=seed,
        init=given.folders.get("model", fresh),
        encoder_decoder=spec.model.kind == "encoder_decoder",
        arms=tuple(arms.arms),
        target=arms.target,
        num_shots=spec.target.num_shots,
        tokenizer=arms.tokenizer.path,
        eos_token=arms.tokenizer.eos_token,
        bos_id=bos_id,
        max_input=spec.max_input_tokens,
        max_target=spec.max_target_tokens,
        plan=rule.plan,
        num_steps=rule.num_steps,
        learning=train.optimisation(seed),
        optimizer=train.optimizer,
        activation_checkpointing=train.activation_checkpointing,
        initial_examples=getattr(rule.settings, "initial_examples", 0),
        evaluate_every=train.evaluate_every,
        patience=train.patience,
        mixer=mixer,
        reference=given.folders.get("policy") if compares else None,
        inputs={"arms": [part.uri for part in arms.arms], "target": arms.target},
        settings=identity,
    )


def train_mixes(ctx: Context, tasks: Sequence[MixTask]) -> list[Manifest]:
    """Train every run that is not in the store, in one group of workers; all manifests, in order.

    Raises:
        DivergedError, SpecError: as `run_mix`. PartFailedError, ClusterError: as `run_workers`.
    """
    found = {t.fingerprint: ctx.store.find_manifest("models", t.fingerprint) for t in tasks}
    todo = [task for task in tasks if found[task.fingerprint] is None]
    with ctx.step("mix", total=len(tasks), reused=len(tasks) - len(todo), unit="steps") as advance:
        if todo:
            actor: Any = MixerActor
            mixer = actor.options(name=f"mixer-{uuid4().hex}").remote()
            follower = _MixProgress(ctx, todo, advance)
            compute = ctx.compute
            place = compute.device, compute.gpus_of(compute.trainer)
            work = partial(_work, ctx.store, tuple(todo), mixer, place)
            run_workers(ctx, "mixing", work, follower.hear)
    return [ctx.store.get_manifest("models", task.fingerprint) for task in tasks]


def _work(
    store: Store, tasks: Sequence[MixTask], mixer: Any, place: tuple[str, float], tell: Any
) -> None:
    """In each worker: one run after another."""
    from stillhouse.mixing.run import run_mix
    from stillhouse.models.causal_lm import choose_device
    from stillhouse.training.group import WorkerGroup

    where = choose_device(*place)
    group = WorkerGroup.current()
    for number, task in enumerate(tasks):
        there = store.find_manifest("models", task.fingerprint) is not None
        if group.gather(there)[0]:
            continue
        say = partial(_tell, tell, number, tasks) if group.rank == 0 else None
        run_mix(store, task, RemoteMixer(mixer, task.mixer), device=where, group=group, on_step=say)
        if group.rank == 0:
            tell("run", {"label": task.label, "seed": task.seed, "number": number})


def _tell(tell: Any, number: int, tasks: Sequence[MixTask], step: int, num_steps: int) -> None:
    """Where the job is, in steps over all of its runs."""
    before = sum(task.num_steps for task in tasks[:number])
    tell(STEP, {"step": before + step, "run": number, "of": num_steps})


class _MixProgress:
    """Lets the step's progress move to where the runs are."""

    def __init__(self, ctx: Context, tasks: Sequence[MixTask], advance: Any) -> None:
        self._ctx, self._tasks, self._advance = ctx, tasks, advance
        self._done, self._steps = 0.0, 0

    def hear(self, kind: str, content: dict[str, Any]) -> None:
        """Take one of the workers' news."""
        steps = self._steps
        if kind == STEP:
            steps = max(steps, content["step"])
            place = content["run"] + 0.999 * (
                content["step"] - sum(t.num_steps for t in self._tasks[: content["run"]])
            ) / (self._tasks[content["run"]].num_steps)
        else:
            place = content["number"] + 1.0
            self._ctx.listener.note("mix run", content)
        if place > self._done:
            self._advance(place - self._done, steps - self._steps)
            self._done, self._steps = place, steps
