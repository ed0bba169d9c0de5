"""`job: train`: tokens -> order -> workers -> model artifact."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.models.shape import ModelShape, planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import ModelRef, Needs, given_models
from stillhouse.pipelines.scan import Scan, scan_sources
from stillhouse.pipelines.tokenizer import given_tokenizer, scanned_tokenizer
from stillhouse.pipelines.tokens import NO_DROPS, Packing, TokenizerRef, pack_tasks, tokenise
from stillhouse.pipelines.train_data import (
    HELDOUT,
    INIT,
    TEXT_LENGTH,
    TextSet,
    TrainInputs,
    given_paths,
    moments_of,
)
from stillhouse.pipelines.training import train_models
from stillhouse.pipelines.workers import Gang
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.order import check_workers, default_lanes, default_window
from stillhouse.training.recipe import choose
from stillhouse.training.seen import trained_rows
from stillhouse.training.spec import TrainSpec
from stillhouse.training.task import (
    OnlineTask,
    StartModel,
    TokenSet,
    TrainTask,
    token_set,
    with_order,
)


@dataclass(frozen=True, slots=True)
class TrainRun:
    """Everything that a train job made."""

    model: Manifest
    task: TrainTask
    tokenizer: TokenizerRef


def run_train(ctx: Context, spec: TrainSpec, inputs: TrainInputs) -> TrainRun:
    """Train the model of a spec, or find it.

    Raises:
        StillhouseError: whatever stopped it; run again to go on from the last checkpoint.
    """
    length = spec.sequence_length or inputs.sequence_length or TEXT_LENGTH
    texts = {key: one.inputs for key, one in inputs.sets.items() if isinstance(one, TextSet)}
    scans = scan_sources(ctx, texts).sources if texts else []
    tokenizer = _tokenizer(ctx, spec, inputs, scans)
    positions = length + tokenizer.num_extra
    needs = Needs(tokenizer.vocab_size, positions)
    paths = given_paths(spec)
    init = given_models(ctx, {INIT: paths.pop(INIT)}, needs)[INIT] if INIT in paths else None
    models = given_models(ctx, paths, replace(needs, comparable=True))
    sets = _tokens(ctx, inputs.sets, scans, tokenizer, length)
    heldout = sets.pop() if HELDOUT in inputs.sets else None
    shape = planned_shape(spec.model, tokenizer.vocab_size, positions)
    task = train_task(spec, sets, heldout, tokenizer, init or shape)
    task = replace(task, code=inputs.code)
    shape = init.shape if init else shape
    if spec.online is None:
        check_workers(task.order(), spec.compute.trainers)
    else:
        task = with_online(spec, models, task)
    with _online_scorers(ctx, task) as (scorers, held), Gang(ctx, held) as gang:
        [model] = train_models(ctx, gang, "train", [task], shape, scorers)
    return TrainRun(model, task, tokenizer)


def _online_scorers(
    ctx: Context, task: TrainTask
) -> AbstractContextManager[tuple[list[Any], dict[str, float]]]:
    if task.online is None or ctx.store.find_manifest("models", task.fingerprint) or ctx.dry:
        return nullcontext(([], {}))
    from stillhouse.pipelines.online import online_scorers

    return online_scorers(ctx, task)


def _tokenizer(
    ctx: Context, spec: TrainSpec, inputs: TrainInputs, scans: Sequence[Scan]
) -> TokenizerRef:
    """The tokenizer that is given, or one that is trained on the documents to train on."""
    seen = inputs.tokenizer
    if seen is not None:
        return given_tokenizer(ctx, str(seen.folder), seen.eos_token, seen.bos)
    assert spec.tokenizer is not None
    trained = [scan for scan in scans if scan.name != HELDOUT]
    paths = [path for scan in trained for path in scan.inputs.source.paths]
    return scanned_tokenizer(ctx, spec.tokenizer, paths, trained)


def _tokens(
    ctx: Context,
    sets: Mapping[str, TokenSet | TextSet],
    scans: Sequence[Scan],
    tokenizer: TokenizerRef,
    length: int,
) -> list[TokenSet]:
    """All sets as tokens; documents are packed."""
    made: dict[str, Manifest] = {}
    if scans:
        packing = [
            Packing(s, NO_DROPS, pack_tasks(ctx.store, s, NO_DROPS, tokenizer, length))
            for s in scans
        ]
        packed = tokenise(ctx, length, packing, tokenizer, [scan.name for scan in scans])
        made = {scan.name: done.manifest for scan, done in zip(scans, packed, strict=True)}
    return [
        one
        if isinstance(one, TokenSet)
        else replace(
            token_set(ctx.store, made[key], one.name, one.weight),
            masked=one.inputs.source.columns.prompt is not None,
        )
        for key, one in sets.items()
    ]


def train_task(
    spec: TrainSpec,
    sets: Sequence[TokenSet],
    heldout: TokenSet | None,
    tokenizer: TokenizerRef,
    start: ModelRef | ModelShape,
) -> TrainTask:
    """The training as plain values, named by all that decides the model.

    `start`: the model that it goes on from, or the shape of a fresh one.
    """
    init, origin = spec.model, "fresh"
    if isinstance(start, ModelRef):
        moments = moments_of(Store(start.folder.rsplit("/", 2)[0]), spec, start.folder)
        init = StartModel(start.folder, start.fingerprint, moments=moments)
        origin = "trained" if start.made_here else "given"
    shape = start.shape if isinstance(start, ModelRef) else start
    length, online = sets[0].sequence_length, spec.online
    one_pass = sum(one.num_tokens for one in sets)  # of tau candidates one is trained on
    num_tokens = spec.train.num_tokens or (one_pass if online is None else one_pass / online.tau)
    settings = choose(
        spec.train,
        width=shape.hidden_size,
        num_tokens=num_tokens,
        sequence_length=length,
        start=origin,
    )
    num_steps = max(1, round(num_tokens / (length * settings.batch_size)))
    return TrainTask(
        role="target",
        label=spec.name or "target",
        init=init,
        data=tuple(sets),
        heldout=heldout,
        tokenizer=tokenizer.path,
        tokenizer_digest=tokenizer.digest,
        eos_token=tokenizer.eos_token,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        settings=with_order(settings, sets, num_steps),
        num_steps=num_steps,
        device=spec.compute.device,
        gpus=spec.compute.gpus_of(spec.compute.trainer),
    )


def with_online(spec: TrainSpec, models: Mapping[str, ModelRef], task: TrainTask) -> TrainTask:
    """The same training on batches that are chosen while it goes on.

    By default it sees each candidate once. Rows that the prior was trained on, as far as it tells,
    and rows with held-out text are not chosen.
    """
    online, [pool] = spec.online, task.data
    assert online is not None
    candidates = round(online.tau * task.settings.batch_size)
    lanes = spec.train.lanes or default_lanes(candidates, pool.num_rows)
    num_steps = task.num_steps if spec.train.num_tokens else max(1, pool.num_rows // candidates)
    prior, conditional = models["online.prior"], models["online.conditional"]
    hidden, _ = trained_rows(prior.folder, pool.digests)
    return replace(
        task,
        num_steps=num_steps,
        settings=with_order(
            task.settings.model_copy(update={"checkpoint_every": spec.train.checkpoint_every}),
            task.data,
            num_steps,
        ),
        online=OnlineTask(
            candidates=candidates,
            lanes=lanes,
            shuffled=spec.train.window or default_window(lanes, task.sequence_length),
            prior=StartModel(prior.folder, prior.fingerprint),
            conditional=StartModel(conditional.folder, conditional.fingerprint),
            scoring=online.scoring,
            hidden={pool.digests.index(digest): rows for digest, rows in hidden.items()},
            gpus=spec.compute.gpus_of(spec.compute.scorer),
            threads=spec.compute.threads_per_worker,
        ),
    )
