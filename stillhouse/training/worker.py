"""What each worker of a training does, from the order of its data to the model artifact.

    order -> fetch -> TokenStream -> Trainer -> fit (checkpoints) -> the first worker commits

A worker that is called again, in another process and with another number of workers, continues from
the newest checkpoint.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stillhouse.models.causal_lm import build_like, build_model, commit_model, load_model
from stillhouse.models.device import choose_device
from stillhouse.selection.quotas import OTHER
from stillhouse.spec import ModelSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import identity
from stillhouse.text.pieces import LOSS_MASK, Pieces, read_pieces, token_ids
from stillhouse.text.token_bytes import token_bytes
from stillhouse.text.tokenizer import Tokenizer, load_tokenizer
from stillhouse.training.checkpoint import WEIGHT, Snapshot, newest_moments
from stillhouse.training.evaluate import (
    Measured,
    SourceLoss,
    bits_per_byte,
    heldout_bytes,
    measure,
    split_halves,
)
from stillhouse.training.fetch import Fetch
from stillhouse.training.group import WorkerGroup
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.objectives import make_objective, signals_of
from stillhouse.training.objectives.teaching import check_teacher
from stillhouse.training.online import Ask, OnlineBatches
from stillhouse.training.run import History, complete, training_totals
from stillhouse.training.seen import SEEN, documents_seen, seen_bytes, trained_on_bytes
from stillhouse.training.signals import COLUMNS, column
from stillhouse.training.stream import BatchSource, TokenStream
from stillhouse.training.task import TRAINED_ON, Tell, TokenSet, TrainTask


def signals_wanted(task: TrainTask) -> list[str]:
    """The columns of the batches beside the tokens: a mask only if a data set has one."""
    masked = any(one.masked for one in task.data)
    wanted = signals_of(task.settings.full_objective, task.code)
    own = [name for name in wanted if masked or name != LOSS_MASK]
    if task.settings.objective.runs_teachers:
        return own
    return own + [column(name, i) for i in range(len(task.teachers)) for name in COLUMNS]


def streamed_batches(task: TrainTask, fetch: Fetch, group: WorkerGroup) -> BatchSource:
    """All samples of a task in its order."""
    return TokenStream(
        task.order(),
        fetch,
        rank=group.rank,
        num_workers=group.size,
        names=[one.name for one in task.data],
        num_steps=task.num_steps,
        vocab_size=task.vocab_size,
        signals=signals_wanted(task),
    )


def online_batches(task: TrainTask, ask: Ask, group: WorkerGroup) -> BatchSource:
    """The best of each window of candidates."""
    return OnlineBatches(
        ask,
        task.order().describe(),
        global_batch=task.settings.batch_size,
        rank=group.rank,
        num_workers=group.size,
    )


def train_worker(
    store: Store,
    task: TrainTask,
    source: Callable[[WorkerGroup], BatchSource],
    tell: Tell,
    group: WorkerGroup | None = None,
) -> None:
    """Train, from the newest checkpoint if there is one, and commit the model.

    Args:
        store: for checkpoints and model.
        source: makes this worker's share of the batches.
        tell: called by the first worker.
        group: the workers, all of which call this; default this process alone.

    Raises:
        DivergedError: the loss became NaN or exploded; the last good checkpoint stays.
        ArtifactError: a part that was changed or lost.
        InputError: a teacher in the workers gives NaN.
    """
    settings, device = task.settings, choose_device(task.device, task.gpus)
    group = group or WorkerGroup()
    stream = source(group)
    running = task.teachers if settings.objective.runs_teachers else ()
    teachers = [load_model(t.folder, dtype=settings.dtype, device=device) for t in running]
    for i, teacher in enumerate(teachers):
        check_teacher(teacher, task.vocab_size, f"train.objective.teachers.{i}")
    trainer = Trainer(
        _adapted(task).get_base_model() if task.lora else start_model(task),
        stream,
        settings,
        device=device,
        num_steps=task.num_steps,
        objective=partial(make_objective, settings.full_objective, task.code),
        group=group,
        activation_checkpointing=settings.activation_checkpointing,
        stop_on_explosion=True,
        bos_id=task.bos_id,
        teachers=teachers,
        vocab_size=task.vocab_size,
        mask_id=task.mask_id,
    )
    if not isinstance(task.init, ModelSettings) and task.init.moments is not None:
        trainer.take_moments(newest_moments(store, task.init.moments))
    held = None
    if task.heldout is not None:
        words = None if task.mask_id is not None else load_tokenizer(task.tokenizer, task.eos_token)
        held = _Heldout(task.heldout, words, trainer.counted)
    told = tell if group.rank == 0 else lambda *_: None
    evaluate = partial(_evaluate, trainer, held)
    history = History(task.num_steps, settings.eval_points, told, evaluate)

    def commit(snapshot: Snapshot) -> None:
        stream.close()
        seen = group.gather(documents_seen(task, group.rank, group.size))
        if group.rank == 0:
            files = {SEEN: seen_bytes(seen)}
            chosen = trained_on_bytes(task.data)
            if chosen is not None:
                files[TRAINED_ON] = chosen
            _commit(store, task, snapshot, history.state_dict(), files)

    complete(store, task, trainer, history, tell, group, commit)


def start_model(task: TrainTask, seed: int | None = None) -> PreTrainedModel:
    """The float32 model on the CPU before the first step."""
    seed = task.settings.seed if seed is None else seed
    if isinstance(task.init, ModelSettings):
        return build_model(
            task.init,
            vocab_size=task.vocab_size,
            sequence_length=task.num_positions,
            seed=seed,
            eos_id=load_tokenizer(task.tokenizer, task.eos_token).eos_id,
        )
    if task.init.fresh:
        return build_like(task.init.folder, seed=seed)
    return load_model(task.init.folder, dtype="float32", device=torch.device("cpu"))


def _adapted(task: TrainTask) -> Any:
    """The start model with the adapters that are trained, a `PeftModel`."""
    from stillhouse.training.lora import with_adapters  # peft, which is an extra

    assert task.lora is not None
    return with_adapters(start_model(task), task.lora, task.settings.seed)


class _Heldout:
    """All sequences [N, T] of some parts; documents and mask [N, T] if all parts have them; and in
    which half each document is, or sequence.

    Args:
        parts: of the sequences.
        tokenizer: gives the bytes of their text; None: of a masked model, whose losses are not
            those of a text.
        counted: says which tokens [N, T] have a loss.
    """

    def __init__(
        self,
        parts: TokenSet,
        tokenizer: Tokenizer | None,
        counted: Callable[[NDArray[Any]], NDArray[np.float32] | None],
    ) -> None:
        tables = [read_table(uri) for uri in parts.uris]
        columns = [
            name
            for name in ("input_ids", "documents", LOSS_MASK)
            if all(name in table.column_names for table in tables)
        ]
        table = pa.concat_tables([table.select(columns) for table in tables])
        self.input_ids = token_ids(table)
        self.pieces: Pieces | None = read_pieces(table) if "documents" in columns else None
        self.halves = split_halves(self.input_ids, self.pieces)
        self.mask: NDArray[np.float32] | None = None
        if LOSS_MASK in columns:
            values = table[LOSS_MASK].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self.mask = values.astype(np.float32).reshape(self.input_ids.shape)
        marks = counted(self.input_ids)
        if marks is not None:
            self.mask = marks if self.mask is None else marks * self.mask
        self._bytes: dict[str | None, int] = {None: 0}
        if tokenizer is not None:
            lengths = token_bytes(tokenizer)
            self._bytes = heldout_bytes(self.input_ids, lengths, self.pieces, self.mask)

    def described(self, made: Measured) -> dict[str, Any]:
        """The losses as JSON values, with bits per byte of their text."""
        counted = np.ones_like(self.input_ids) if self.mask is None else self.mask
        whole = SourceLoss(made.nll, int(counted[:, 1:].sum(dtype=np.float64)))
        listed = sum(self._bytes[name] for name in made.sources if name in self._bytes)
        sizes = {OTHER: self._bytes[None] - listed, **self._bytes}
        return {
            "nll": made.nll,
            "bits_per_byte": bits_per_byte(whole, self._bytes[None]),
            "halves": {name: asdict(loss) for name, loss in made.halves.items()},
            "heldout": {
                name: {**asdict(loss), "bits_per_byte": bits_per_byte(loss, sizes.get(name, 0))}
                for name, loss in made.sources.items()
            },
        }


def _evaluate(
    trainer: Trainer, held: _Heldout | None, record: StepRecord
) -> tuple[dict[str, Any], float | None]:
    """Losses by source, of the held-out sequences and of those trained on since the last time."""
    trained = trainer.take_source_losses()
    seen = {"trained": {name: asdict(loss) for name, loss in trained.items()}}
    if held is None:
        return {"nll": record.loss, "halves": {}, "heldout": {}, **seen}, None
    made = measure(trainer, held.input_ids, held.pieces, held.mask, held.halves)
    return {**held.described(made), **seen}, made.nll


def _commit(
    store: Store,
    task: TrainTask,
    snapshot: Snapshot,
    history: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    """Write the model, its tokenizer and the training's history to the store."""
    adapted = _adapted(task) if task.lora else None
    model = adapted.get_base_model() if adapted else start_model(task, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(snapshot.tensors[WEIGHT + name])
    save = None
    if adapted is not None:
        from stillhouse.training.lora import merged, save_adapters

        if task.lora and task.lora.save == "adapter":
            save = partial(save_adapters, adapted)
        else:
            model = merged(adapted)
    evaluations = history["evaluations"]
    adapters = {"num_trained": _num_trained(snapshot)} if adapted is not None else {}
    sets = [{"weight": identity(one.share.weight), "parts": one.identity()} for one in task.data]
    train = task.settings.identity()
    if task.code is not None:
        train["objective"]["code"] = task.code.digest
    tokenizer: dict[str, Any] = {"sha256": task.tokenizer_digest, "eos_token": task.eos_token}
    if task.bos_id is not None:
        tokenizer["bos_id"] = task.bos_id
    commit_model(
        store,
        task.fingerprint,
        model,
        task.tokenizer,
        files=files,
        save=save,
        inputs={"data": {"sets": sets, "heldout": task.heldout and task.heldout.identity()}},
        settings={"model": identity(task.init), "train": train, "tokenizer": tokenizer},
        totals={
            "role": task.role,
            "label": task.label,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            **adapters,
            "curve": [[e["tokens"], e["nll"]] for e in evaluations] if task.heldout else [],
            **training_totals(store, task.checkpoints, snapshot, history),
        },
    )


def _num_trained(snapshot: Snapshot) -> int:
    return sum(one.numel() for name, one in snapshot.tensors.items() if name.startswith(WEIGHT))
