"""Training one model on streamed data: tokens -> order -> Ray Train workers -> model artifact.

In each worker Ray Data fetches windows of the parts ahead of the training; checkpoints go to the
store in the background; a lost worker's group begins again at the last one.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from stillhouse.fingerprint import fingerprint
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import ModelRef, Needs, given_models
from stillhouse.pipelines.models import trained_rows
from stillhouse.pipelines.scan import scan_sources
from stillhouse.pipelines.tokenizer import given_tokenizer
from stillhouse.pipelines.tokens import NO_DROPS, Packing, TokenizerRef, pack_tasks, tokenise
from stillhouse.pipelines.train_data import TEXT_LENGTH, TextSet, TokenSet, TrainInputs, given_paths
from stillhouse.pipelines.training import tell_recipe
from stillhouse.pipelines.workers import STEP, run_workers
from stillhouse.spec import Optimisation
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.order import Rows, check_workers, default_lanes, default_window
from stillhouse.training.recipe import choose
from stillhouse.training.spec import TrainingSettings, TrainSpec
from stillhouse.training.task import OnlineTask, Tell, TrainTask

TRAIN_VERSION = 2
_POINTS = 10
_MAX_EVERY = 1000
_SCORING = {"dtype", "attention"}


@dataclass(frozen=True, slots=True)
class TrainRun:
    """Everything that a train job made."""

    model: Manifest
    task: TrainTask
    tokenizer: TokenizerRef
    datasets: tuple[TokenSet, ...]


def run_train(ctx: Context, spec: TrainSpec, inputs: TrainInputs) -> TrainRun:
    """Train the model of a spec, or find it.

    Raises:
        StillhouseError: whatever stopped it; run again to go on from the last checkpoint.
    """
    seen = inputs.tokenizer
    assert seen.folder is not None
    tokenizer = given_tokenizer(ctx, seen.folder, seen.eos_token, seen.bos)
    length = spec.sequence_length or inputs.sequence_length or TEXT_LENGTH
    positions = length + tokenizer.num_extra
    needs = Needs(tokenizer.vocab_size, positions, comparable=True)
    models = given_models(ctx, given_paths(spec), needs)
    sets = _tokens(ctx, inputs.all, tokenizer, length)
    heldout = sets.pop() if inputs.heldout else None
    task = train_task(spec, sets, heldout, tokenizer)
    if spec.online is None:
        check_workers(task.order(), spec.compute.trainers)
    else:
        task = with_online(spec, models, sets[0], task)
    return TrainRun(train_model(ctx, task), task, tokenizer, tuple(sets))


def _tokens(
    ctx: Context, sets: Sequence[TokenSet | TextSet], tokenizer: TokenizerRef, length: int
) -> list[TokenSet]:
    """All sets as tokens; documents are scanned and packed."""
    texts = [one for one in sets if isinstance(one, TextSet)]
    made: dict[str, Manifest] = {}
    if texts:
        scanned = scan_sources(ctx, {one.key: one.inputs for one in texts})
        packing = [
            Packing(s, NO_DROPS, pack_tasks(ctx.store, s, NO_DROPS, tokenizer, length))
            for s in scanned.sources
        ]
        packed = tokenise(ctx, length, packing, tokenizer, [one.key for one in texts])
        made = {one.key: done.manifest for one, done in zip(texts, packed, strict=True)}
    return [
        one
        if isinstance(one, TokenSet)
        else TokenSet(
            key=one.key,
            name=one.name,
            weight=one.weight,
            uris=tuple(ctx.store.path(part.path) for part in made[one.key].parts),
            rows=tuple(part.num_rows for part in made[one.key].parts),
            digests=tuple(part.sha256 for part in made[one.key].parts),
            sequence_length=length,
            tokenizer=None,
        )
        for one in sets
    ]


def train_task(
    spec: TrainSpec,
    sets: Sequence[TokenSet],
    heldout: TokenSet | None,
    tokenizer: TokenizerRef,
) -> TrainTask:
    """The training as plain values, named by all that decides the model.

    Raises:
        ModelError: sizes that do not go together, or a context shorter than the sequences.
    """
    length = sets[0].sequence_length
    planned_shape(spec.model, tokenizer.vocab_size, length + tokenizer.num_extra)
    num_tokens = spec.train.num_tokens or _one_pass(spec, length, sets)
    settings = choose(
        spec.train,
        width=spec.model.hidden_size,
        num_tokens=num_tokens,
        sequence_length=length,
    )
    batch = settings.batch_size
    lanes = settings.lanes or default_lanes(batch, min(one.num_rows for one in sets))
    window = settings.window or default_window(lanes, length, len(sets))
    num_steps = max(1, round(num_tokens / (length * batch)))
    identity: dict[str, Any] = {
        "model": spec.model.model_dump(mode="json"),
        "train": settings.model_dump(mode="json", include=set(Optimisation.model_fields)),
        "steps": {"num_steps": num_steps, "eval_points": settings.eval_points},
        "order": {"lanes": lanes, "window": window},
        "data": {
            "sets": [{"weight": one.weight, "parts": one.identity()} for one in sets],
            "heldout": heldout.identity() if heldout else None,
            "sequence_length": length,
        },
        "tokenizer": {"sha256": tokenizer.digest, "eos_token": tokenizer.eos_token},
    }
    if tokenizer.bos_id is not None:
        identity["tokenizer"]["bos_id"] = tokenizer.bos_id
    name = fingerprint(["train", TRAIN_VERSION, identity])
    return TrainTask(
        fingerprint=name,
        checkpoints=fingerprint(["checkpoints", name]),
        label=spec.name or "target",
        identity=identity,
        parts=tuple(uri for one in sets for uri in one.uris),
        datasets=tuple(Rows(one.rows, one.weight) for one in sets),
        names=tuple(one.name for one in sets),
        heldout=heldout.uris if heldout else (),
        sequence_length=length,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.path,
        eos_token=tokenizer.eos_token,
        model=spec.model,
        settings=settings.model_copy(update={"lanes": lanes, "window": window}),
        num_steps=num_steps,
        checkpoint_every=checkpoint_every(settings, num_steps),
        device=spec.compute.device,
        gpus=spec.compute.gpus_of(spec.compute.trainer),
        bos_id=tokenizer.bos_id,
    )


def _one_pass(spec: TrainSpec, length: int, sets: Sequence[TokenSet]) -> float:
    """Tokens to train on where the spec says no number: of tau candidates one is trained on."""
    tokens = length * sum(one.num_rows for one in sets)
    return tokens if spec.online is None else tokens / spec.online.tau


def with_online(
    spec: TrainSpec, models: Mapping[str, ModelRef], pool: TokenSet, task: TrainTask
) -> TrainTask:
    """The same training on batches that are chosen while it goes on.

    By default it sees each candidate once. Rows that the prior was trained on, as far as it tells,
    and rows with held-out text are not chosen.
    """
    online, compute, length = spec.online, spec.compute, task.sequence_length
    assert online is not None
    batch = task.settings.batch_size
    candidates = round(online.tau * batch)
    lanes = spec.train.lanes or default_lanes(candidates, pool.num_rows)
    shuffled = spec.train.window or default_window(lanes, length)
    num_steps = task.num_steps if spec.train.num_tokens else max(1, pool.num_rows // candidates)
    prior, conditional = models.values()
    hidden = trained_rows(prior.folder, pool.digests)
    places = {digest: index for index, digest in enumerate(pool.digests)}
    identity = task.identity | {
        "steps": task.identity["steps"] | {"num_steps": num_steps},
        "order": {"lanes": lanes, "window": shuffled, "candidates": candidates},
        "online": {
            "models": [prior.fingerprint, conditional.fingerprint],
            "scoring": online.scoring.model_dump(include=_SCORING),
        },
    }
    name = fingerprint(["train", TRAIN_VERSION, identity])
    return replace(
        task,
        fingerprint=name,
        checkpoints=fingerprint(["checkpoints", name]),
        identity=identity,
        num_steps=num_steps,
        checkpoint_every=checkpoint_every(spec.train, num_steps),
        online=OnlineTask(
            parts=pool.uris,
            rows=pool.rows,
            candidates=candidates,
            lanes=lanes,
            shuffled=shuffled,
            seed=spec.train.seed,
            prior=prior.folder,
            conditional=conditional.folder,
            scoring=online.scoring,
            tokenizer=task.tokenizer,
            eos_token=task.eos_token,
            heldout=task.heldout,
            hidden={places[digest]: rows for digest, rows in hidden.items()},
            device=compute.device,
            gpus=compute.gpus_of(compute.scorer),
            threads=compute.threads_per_worker,
            bos_id=task.bos_id,
        ),
    )


def checkpoint_every(settings: TrainingSettings, num_steps: int) -> int:
    """Steps between checkpoints."""
    return settings.checkpoint_every or max(1, min(_MAX_EVERY, num_steps // _POINTS))


def train_model(ctx: Context, task: TrainTask) -> Manifest:
    """Train the model of a task in `compute.trainers` workers, or find it.

    Raises:
        DivergedError, ArtifactError: as `train_worker`. PartFailedError, ClusterError: as
            `run_workers`.
    """
    found = ctx.store.find_manifest("models", task.fingerprint)
    with ctx.step("train", total=1, reused=int(found is not None)) as advance:
        if found is None:
            tell_recipe(ctx, "train", task.settings)
            follow = _TrainProgress(ctx, task, advance)
            with _online_scorers(ctx, task.online) as (scorers, held):
                work = partial(_work, ctx.store, task, scorers)
                run_workers(ctx, f"training {task.label!r}", work, follow.hear, held)
            found = ctx.store.get_manifest("models", task.fingerprint)
    _account(ctx, task, found)
    return found


def _online_scorers(
    ctx: Context, task: OnlineTask | None
) -> AbstractContextManager[tuple[list[Any], dict[str, float]]]:
    if task is None:
        return nullcontext(([], {}))
    from stillhouse.pipelines.online import online_scorers

    return online_scorers(ctx, task)


def _work(store: Store, task: TrainTask, scorers: list[Any], tell: Tell) -> None:
    """In each worker; the driver needs none of these modules, and some take seconds."""
    from ray.train import get_context

    from stillhouse.pipelines.fetch import stream_windows
    from stillhouse.training.worker import online_batches, streamed_batches, train_worker

    if task.online is not None:
        from stillhouse.pipelines.online import ask_ahead

        source = partial(online_batches, task, ask_ahead(scorers, task.num_steps))
    else:
        world = get_context().get_world_size()
        lanes = -(-(task.settings.lanes or 1) // world)
        fetch = stream_windows(task.parts, direct=lanes * len(task.datasets))
        source = partial(streamed_batches, task, fetch)
    train_worker(store, task, source, tell)


class _TrainProgress:
    """Lets the step's progress move to where the training is, and keeps what it tells."""

    def __init__(self, ctx: Context, task: TrainTask, advance: Any) -> None:
        self._ctx, self._task, self._advance = ctx, task, advance
        self._step = 0
        self._since = 0

    def hear(self, kind: str, content: dict[str, Any]) -> None:
        """Take one of the workers' news."""
        step = content["step"]
        if kind == "start":
            self._since = max(step, self._step)
        moved = step - max(self._step, 0)
        if kind in (STEP, "start") and moved > 0:
            tokens = moved * self._task.settings.batch_size * self._task.sequence_length
            self._advance(moved / self._task.num_steps, tokens if kind == STEP else 0)
            self._step = step
        if kind != STEP:
            self._ctx.listener.note(f"train {kind}", content)


def _account(ctx: Context, task: TrainTask, made: Manifest) -> None:
    work = ctx.work["train"]
    work.tokens = made.totals["num_tokens"]
    shape = planned_shape(task.model, task.vocab_size, task.num_positions)
    work.flops = 3.0 * shape.flops_per_token(task.sequence_length) * work.tokens
    if not work.reused:
        work.device_seconds = made.totals["measured"]["seconds"] * ctx.compute.trainers
