"""Mixing: arms -> Mixer actor -> training workers -> rewards -> Mixer; a model for each run.

A job's runs (the policy and its controls, with every seed) are trained one after another by the
same workers; a run whose model is in the store already is skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any
from uuid import uuid4

from stillhouse.actors.mixer import MixerActor, RemoteMixer
from stillhouse.mixing.spec import MixModel, MixSpec, MixTask, Rule, StoredModel, rules_of
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import Needs, check_vocabulary, given_models
from stillhouse.pipelines.mix_data import ArmsMade, MixInputs, prepare_arms
from stillhouse.pipelines.workers import STEP, run_workers
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class MixRun:
    """What a mix job made; `models` by label and seed."""

    arms: ArmsMade
    rules: tuple[Rule, ...]
    models: dict[str, dict[int, Manifest]]


def run_mix_job(ctx: Context, spec: MixSpec, inputs: MixInputs, decisions: str) -> MixRun:
    """Prepare the arms and train every run; `decisions` is the URI of the folder for logs.

    Raises:
        StillhouseError: anything; run again to resume from the last checkpoint.
    """
    settings = spec.tokenizer
    vocab_size = 0  # of a tokenizer that is still to be trained nothing is known
    if settings.path is not None:
        vocab_size = load_tokenizer(settings.path, settings.eos_token).vocab_size
    needs = Needs(vocab_size, encoder_decoder=spec.model.kind == "encoder_decoder")
    models = given_models(ctx, spec.given_paths, needs)
    given = {key: StoredModel(model.fingerprint, model.folder) for key, model in models.items()}
    arms = prepare_arms(ctx, spec, inputs)
    tokenizer = arms.tokenizer
    if spec.reference is not None:
        loaded = load_tokenizer(tokenizer.path, tokenizer.eos_token)
        check_vocabulary(loaded, tokenizer.path, {"policy": spec.reference})
    rules = rules_of(spec, [part.num_rows for part in arms.arms])
    tasks = [
        MixTask(
            rule=rule,
            seed=seed,
            decided_by=rule.policy.identity(seed),
            model=spec.model if "model" not in given else MixModel(kind=spec.model.kind),
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
        for seed in spec.seeds
        for rule in rules
    ]
    made: dict[str, dict[int, Manifest]] = {rule.label: {} for rule in rules}
    for task, manifest in zip(tasks, _train(ctx, tasks), strict=True):
        made[task.rule.label][task.seed] = manifest
    return MixRun(arms, tuple(rules), made)


def _train(ctx: Context, tasks: Sequence[MixTask]) -> list[Manifest]:
    """Train every run that is not in the store, in one group of workers; all manifests, in order.

    Raises:
        DivergedError, SpecError: as `run_mix`. PartFailedError, ClusterError: as `run_workers`.
    """
    todo = [t for t in tasks if ctx.store.find_manifest("models", t.fingerprint) is None]
    with ctx.step("mix", total=len(tasks), reused=len(tasks) - len(todo), unit="steps") as advance:
        if todo:
            actor: Any = MixerActor
            mixer = actor.options(name=f"mixer-{uuid4().hex}").remote()
            compute = ctx.compute
            place = compute.device, compute.gpus_of(compute.trainer)
            work, started = partial(_work, ctx.store, tuple(todo), mixer, place), perf_counter()
            run_workers(ctx, "mixing", work, _Progress(ctx, advance).take)
            busy = (perf_counter() - started) * compute.trainers
            ctx.work["mix"].worked(busy, compute.resources(place[1]))
    return [ctx.store.get_manifest("models", task.fingerprint) for task in tasks]


def _work(
    store: Store, tasks: Sequence[MixTask], mixer: Any, place: tuple[str, float], send: Any
) -> None:
    """In each worker: one run after another."""
    from stillhouse.mixing.run import run_mix
    from stillhouse.models.device import choose_device
    from stillhouse.training.group import WorkerGroup

    device, group, before = choose_device(*place), WorkerGroup.current(), 0
    for number, task in enumerate(tasks):
        num_steps, first = task.rule.num_steps, group.rank == 0
        if not group.gather(store.find_manifest("models", task.fingerprint) is not None)[0]:
            report = partial(_report, send, number, before, num_steps) if first else None
            remote: Any = RemoteMixer(mixer, task)
            run_mix(store, task, remote, device=device, group=group, on_step=report)
            if first:
                about = {"label": task.rule.label, "seed": task.seed}
                send("run", about | {"step": before, "done": number + 1})
        before += num_steps


def _report(send: Any, number: int, before: int, num_steps: int, step: int) -> None:
    """Report the steps of all runs so far, and the number of runs that are done."""
    send(STEP, {"step": before + step, "done": number + 0.999 * step / num_steps})


class _Progress:
    """Advances the job's step with its runs, never backwards: a lost worker repeats some steps."""

    def __init__(self, ctx: Context, advance: Any) -> None:
        self._ctx, self._advance = ctx, advance
        self._done, self._steps = 0.0, 0

    def take(self, kind: str, content: dict[str, Any]) -> None:
        if kind != STEP:
            self._ctx.listener.note("mix run", content)
        if content["done"] > self._done:
            steps = max(self._steps, content["step"])
            self._advance(content["done"] - self._done, steps - self._steps)
            self._done, self._steps = content["done"], steps
