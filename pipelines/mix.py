"""Mixing: arms -> Mixer actor -> training workers -> rewards -> Mixer; a model for each run.

A job's runs (the policy and its controls, with every seed) follow each other in the same workers;
one that is in the store already is not run again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from stillhouse.actors.mixer import MixerActor, RemoteMixer
from stillhouse.mixing.spec import MixSpec, Rule, rules_of
from stillhouse.mixing.task import MixTask, StoredModel
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import Needs, check_vocabulary, given_models
from stillhouse.pipelines.mix_data import ArmsMade, MixInputs, prepare_arms
from stillhouse.pipelines.workers import STEP, run_workers
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class MixRun:
    """Everything that a mix job made; `models` by label and seed."""

    arms: ArmsMade
    rules: tuple[Rule, ...]
    models: dict[str, dict[int, Manifest]]


def run_mix_job(ctx: Context, spec: MixSpec, inputs: MixInputs, decisions: str) -> MixRun:
    """Prepare the arms and train every run.

    Args:
        ctx: the run.
        spec: the job.
        inputs: what it reads.
        decisions: URI of the folder under which logs are written.

    Raises:
        StillhouseError: whatever stopped it; run again to go on from the last checkpoint.
    """
    asked = spec.tokenizer
    size = 0 if asked.path is None else load_tokenizer(asked.path, asked.eos_token).vocab_size
    needs = Needs(vocab_size=size, encoder_decoder=spec.model.kind == "encoder_decoder")
    placed = given_models(ctx, spec.given_paths, needs)
    given = {key: StoredModel(model.fingerprint, model.folder) for key, model in placed.items()}
    arms = prepare_arms(ctx, spec, inputs)
    if spec.reference is not None:
        tokenizer = load_tokenizer(arms.tokenizer.path, arms.tokenizer.eos_token)
        check_vocabulary(tokenizer, arms.tokenizer.path, {"policy": spec.reference})
    rules = rules_of(spec, [part.num_rows for part in arms.arms])
    tasks = [
        mix_task(spec, arms, rule, seed, given, decisions) for seed in spec.seeds for rule in rules
    ]
    made = train_mixes(ctx, tasks)
    models: dict[str, dict[int, Manifest]] = {rule.label: {} for rule in rules}
    for task, manifest in zip(tasks, made, strict=True):
        models[task.rule.label][task.seed] = manifest
    return MixRun(arms, tuple(rules), models)


def mix_task(
    spec: MixSpec,
    arms: ArmsMade,
    rule: Rule,
    seed: int,
    given: Mapping[str, StoredModel],
    decisions: str,
) -> MixTask:
    """The run of a rule and a seed."""
    tokenizer = arms.tokenizer
    return MixTask(
        rule=rule,
        seed=seed,
        decided_by=rule.policy.identity(seed),
        model=spec.model,
        init=given.get("model"),
        reference=given.get("policy") if rule.plan.reward == "excess" else None,
        arms=tuple(arms.arms),
        target=arms.target,
        num_shots=spec.target.num_shots,
        tokenizer=tokenizer.path,
        tokenizer_digest=tokenizer.digest,
        eos_token=tokenizer.eos_token,
        bos_id=tokenizer.bos_id if spec.model.kind == "decoder" else None,
        max_input=spec.max_input_tokens,
        max_target=spec.max_target_tokens,
        train=spec.train,
        log=f"{decisions}/{rule.label}-{seed}",
        log_every=spec.log_every,
    )


def train_mixes(ctx: Context, tasks: Sequence[MixTask]) -> list[Manifest]:
    """Train every run that is not in the store, in one group of workers; all manifests, in order.

    Raises:
        DivergedError, SpecError: as `run_mix`. PartFailedError, ClusterError: as `run_workers`.
    """
    names = [task.fingerprint for task in tasks]
    found = {name: ctx.store.find_manifest("models", name) for name in names}
    todo = [task for task, name in zip(tasks, names, strict=True) if found[name] is None]
    with ctx.step("mix", total=len(tasks), reused=len(tasks) - len(todo), unit="steps") as advance:
        if todo:
            actor: Any = MixerActor
            mixer = actor.options(name=f"mixer-{uuid4().hex}").remote()
            compute = ctx.compute
            place = compute.device, compute.gpus_of(compute.trainer)
            work = partial(_work, ctx.store, tuple(todo), mixer, place)
            run_workers(ctx, "mixing", work, _MixProgress(ctx, advance).take)
    return [ctx.store.get_manifest("models", name) for name in names]


def _work(
    store: Store, tasks: Sequence[MixTask], mixer: Any, place: tuple[str, float], send: Any
) -> None:
    """In each worker: one run after another."""
    from stillhouse.mixing.run import run_mix
    from stillhouse.models.causal_lm import choose_device
    from stillhouse.training.group import WorkerGroup

    where, group, before = choose_device(*place), WorkerGroup.current(), 0
    for number, task in enumerate(tasks):
        there = store.find_manifest("models", task.fingerprint) is not None
        if not group.gather(there)[0]:
            first = group.rank == 0
            report = partial(_report, send, task, number, before) if first else None
            remote: Any = RemoteMixer(mixer, task)
            run_mix(store, task, remote, device=where, group=group, on_step=report)
            if first:
                about = {"label": task.rule.label, "seed": task.seed}
                send("run", about | {"step": before, "done": number + 1})
        before += task.rule.num_steps


def _report(send: Any, task: MixTask, number: int, before: int, step: int) -> None:
    """How far the job is: steps of all its runs, and runs that are done."""
    done = number + 0.999 * step / task.rule.num_steps
    send(STEP, {"step": before + step, "done": done})


class _MixProgress:
    """Moves the progress of the job's step to where the runs are."""

    def __init__(self, ctx: Context, advance: Any) -> None:
        self._ctx, self._advance = ctx, advance
        self._done, self._steps = 0.0, 0

    def take(self, kind: str, content: dict[str, Any]) -> None:
        """Take one of the workers' events; a lost worker goes back to its checkpoint."""
        if kind != STEP:
            self._ctx.listener.note("mix run", content)
        if content["done"] > self._done:
            steps = max(self._steps, content["step"])
            self._advance(content["done"] - self._done, steps - self._steps)
            self._done, self._steps = content["done"], steps
