"""`job: train`: tokens -> order -> workers -> model artifact."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stillhouse.errors import InputError
from stillhouse.models.shape import ModelShape, planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.duplicates import Drops
from stillhouse.pipelines.given import ModelRef, Needs, given_models
from stillhouse.pipelines.scan import Scan, scan_sources
from stillhouse.pipelines.teachers import check_objective, stored_signals, teacher_hosts
from stillhouse.pipelines.tokenizer import given_tokenizer, scanned_tokenizer
from stillhouse.pipelines.tokens import (
    Packing,
    Tokenised,
    TokenizerRef,
    pack_tasks,
    tokenise,
)
from stillhouse.pipelines.train_data import (
    HELDOUT,
    INIT,
    TEACHER,
    TEXT_LENGTH,
    TextSet,
    TrainInputs,
    given_paths,
    moments_of,
)
from stillhouse.pipelines.training import make_task, online_scorers, train_models
from stillhouse.pipelines.workers import Gang
from stillhouse.spec import ModelSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.limits import within_limits
from stillhouse.training.order import check_workers, default_lanes, default_window
from stillhouse.training.seen import trained_rows
from stillhouse.training.spec import TrainSpec
from stillhouse.training.task import (
    OnlineTask,
    Start,
    StartModel,
    TokenSet,
    TrainTask,
    token_set,
    with_order,
)


@dataclass(frozen=True, slots=True)
class TrainRun:
    """The results of a train job.

    Attributes:
        packed: the documents that it made tokens of.
        num_dead: rows of them that could not be read.
    """

    model: Manifest
    task: TrainTask
    tokenizer: TokenizerRef
    packed: list[Tokenised]
    num_dead: int = 0


def run_train(ctx: Context, spec: TrainSpec, inputs: TrainInputs) -> TrainRun:
    """Train the model of a spec, or find it in the store.

    Raises:
        StillhouseError: run again to continue from the last checkpoint.
    """
    objective = spec.train.objective
    check_objective(ctx, objective, inputs.code)
    length = spec.sequence_length or inputs.sequence_length or TEXT_LENGTH
    texts = {key: one.inputs for key, one in inputs.sets.items() if isinstance(one, TextSet)}
    scans = scan_sources(ctx, texts).sources if texts else []
    tokenizer = _tokenizer(ctx, spec, inputs, scans)
    needs = Needs(tokenizer.vocab_size, length + tokenizer.num_extra, masked=True)
    paths = given_paths(spec)
    init = None
    if INIT in paths:
        fits = replace(needs, lora=spec.lora)
        init = given_models(ctx, {INIT: paths.pop(INIT)}, fits)[INIT]
    taught_by = {key: paths.pop(key) for key in [*paths] if key.startswith(TEACHER)}
    taught_by = [*given_models(ctx, taught_by, needs).values()]
    teachers = teacher_hosts(spec, taught_by, tokenizer)
    models = given_models(ctx, paths, replace(needs, comparable=True, masked=False))
    packed = _packed(ctx, scans, tokenizer, length)
    sets = _token_sets(ctx.store, inputs.sets, scans, packed)
    heldout = sets.pop() if HELDOUT in inputs.sets else None
    fresh = planned_shape(spec.model, needs.vocab_size, needs.num_positions)
    shape = init.shape if init else fresh
    task = _task(spec, sets, heldout, tokenizer, init, shape)
    live = spec.compute if objective.kept_signals == "live" else None
    mask_id = tokenizer.mask_id if shape.masked else None
    task = replace(task, code=inputs.code, teachers=teachers, live=live, mask_id=mask_id)
    keys = [key for key in inputs.sets if key != HELDOUT]
    task = within_limits(task, keys, asked=spec.train.num_tokens is not None)
    if spec.online is None:
        check_workers(task.order(), spec.compute.trainers)
    else:
        task = _with_online(spec, models, task)
    if objective.kept_signals == "stored":
        scored = stored_signals(ctx, objective, inputs.code, teachers, taught_by, task.data)
        task = replace(task, data=tuple(scored))
    read = sum(one.shape.flops_per_token(task.sequence_length) for one in taught_by)
    beside = float(read) if objective.runs_teachers else 0.0
    if shape.masked and taught_by:  # it reads whole sequences too
        beside += 3.0 * shape.flops_per_token(task.sequence_length)
    with online_scorers(ctx, task) as (scorers, held), Gang(ctx, held) as gang:
        [model] = train_models(ctx, gang, "train", [task], shape, scorers, beside)
    return TrainRun(model, task, tokenizer, packed, sum(scan.num_dead for scan in scans))


def _tokenizer(
    ctx: Context, spec: TrainSpec, inputs: TrainInputs, scans: Sequence[Scan]
) -> TokenizerRef:
    """The given tokenizer, or one that is trained on the documents to train on."""
    given = inputs.tokenizer
    if given is not None:
        return given_tokenizer(ctx, str(given.folder), given.eos_token, given.bos)
    assert spec.tokenizer is not None
    trained = [scan for scan in scans if scan.name != HELDOUT]
    paths = [path for scan in trained for path in scan.inputs.source.paths]
    return scanned_tokenizer(ctx, spec.tokenizer, paths, trained)


def _packed(
    ctx: Context, scans: Sequence[Scan], tokenizer: TokenizerRef, length: int
) -> list[Tokenised]:
    """The scanned documents as tokens, in order."""
    if not scans:
        return []
    packing = [
        Packing(scan, Drops(), pack_tasks(ctx.store, scan, Drops(), tokenizer, length))
        for scan in scans
    ]
    return tokenise(ctx, length, packing, tokenizer, [scan.name for scan in scans])


def _token_sets(
    store: Store,
    sets: Mapping[str, TokenSet | TextSet],
    scans: Sequence[Scan],
    packed: Sequence[Tokenised],
) -> list[TokenSet]:
    """All sets as tokens."""
    made = {scan.name: done.manifest for scan, done in zip(scans, packed, strict=True)}
    return [
        one if isinstance(one, TokenSet) else token_set(store, made[key], one.name, one.share)
        for key, one in sets.items()
    ]


def _task(
    spec: TrainSpec,
    sets: Sequence[TokenSet],
    heldout: TokenSet | None,
    tokenizer: TokenizerRef,
    init: ModelRef | None,
    shape: ModelShape,
) -> TrainTask:
    """The training; `init` is the model that it continues from."""
    start: ModelSettings | StartModel = spec.model
    origin: Start = "fresh"
    if init is not None:
        moments = moments_of(Store(init.folder.rsplit("/", 2)[0]), spec, init.folder)
        start = StartModel(init.folder, init.fingerprint, moments=moments, lora=spec.lora)
        origin = "adapters" if spec.lora else "trained" if init.made_here else "given"
    one_pass: float = sum(one.num_tokens * one.share.one_pass for one in sets)
    if spec.online is not None:  # one of tau candidates is trained on
        one_pass /= spec.online.tau
    return make_task(
        spec.compute,
        tokenizer,
        shape,
        sets,
        spec.train,
        spec.train.num_tokens or one_pass,
        role="target",
        label=spec.name or "target",
        init=start,
        start=origin,
        heldout=heldout,
    )


def _with_online(spec: TrainSpec, models: Mapping[str, ModelRef], task: TrainTask) -> TrainTask:
    """The training on batches chosen while it runs, by default from one pass over the data.

    Rows that the prior was trained on, as far as its folder tells, are not chosen.
    """
    online, [pool] = spec.online, task.data
    assert online is not None
    if pool.masked:
        raise InputError(
            "`train.select: online` scores whole sequences, and `data` marks answers: select them "
            "first, by `job: select`"
        )
    candidates = round(online.tau * task.settings.batch_size)
    lanes = spec.train.lanes or default_lanes(candidates, pool.num_rows)
    num_steps = task.num_steps if spec.train.num_tokens else max(1, pool.num_rows // candidates)
    prior, conditional = models["online.prior"], models["online.conditional"]
    hidden, _ = trained_rows(prior.folder, pool.digests)
    asked = {"checkpoint_every": spec.train.checkpoint_every}
    return replace(
        task,
        num_steps=num_steps,
        settings=with_order(task.settings.model_copy(update=asked), task.data, num_steps),
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
