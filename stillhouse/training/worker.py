"""What each worker of a streamed training does, from the order of its data to the model artifact.

    order -> fetch -> TokenStream -> Trainer -> fit (checkpoints) -> the first worker commits

A worker that is called again, in another process and beside another number of workers, goes on
from the newest checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from numpy.typing import NDArray

from stillhouse.models.causal_lm import build_model, choose_device, save_model
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import Pieces, read_pieces, token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.batches import BatchSource
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.evaluate import measure
from stillhouse.training.fetch import Fetch
from stillhouse.training.fit import fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.history import History
from stillhouse.training.job import evaluation_steps, tokenizer_files
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.online import Ask, OnlineBatches
from stillhouse.training.state import WEIGHT, Snapshot
from stillhouse.training.stream import TokenStream
from stillhouse.training.task import CHECKPOINTS, Tell, TrainTask

_TELL_S = 1.0


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out sequences [N, T] and, where the parts tell them, their documents."""

    input_ids: NDArray[Any]
    pieces: Pieces | None


def read_heldout(uris: Sequence[str]) -> Heldout | None:
    """All sequences of some token parts; None where there are no parts."""
    if not uris:
        return None
    tables = [read_table(uri) for uri in uris]
    owned = all("documents" in table.column_names for table in tables)
    columns = ["input_ids", "documents"] if owned else ["input_ids"]
    table = pa.concat_tables([table.select(columns) for table in tables])
    return Heldout(token_ids(table), read_pieces(table) if owned else None)


class ClosedSource(BatchSource, Protocol):
    """A source that reads ahead until it is closed."""

    def close(self) -> None:
        """Stop reading ahead."""
        ...


def streamed_batches(task: TrainTask, fetch: Fetch, group: WorkerGroup) -> ClosedSource:
    """All samples of a task in its order; `fetch` reads the windows of `task.parts`."""
    return TokenStream(
        task.order(),
        fetch,
        rank=group.rank,
        num_workers=group.size,
        names=task.names,
        num_steps=task.num_steps,
        vocab_size=task.vocab_size,
    )


def online_batches(task: TrainTask, ask: Ask, group: WorkerGroup) -> ClosedSource:
    """The best of each window of candidates, as scorers see them."""
    assert task.online is not None
    return OnlineBatches(
        ask,
        task.online.order().describe(),
        global_batch=task.settings.batch_size,
        rank=group.rank,
        num_workers=group.size,
    )


def train_worker(
    store: Store, task: TrainTask, source: Callable[[WorkerGroup], ClosedSource], tell: Tell
) -> None:
    """Train, from the newest checkpoint where there is one, and commit the model.

    All workers of torch's process group call this (or one process without a group).

    Args:
        store: where checkpoints and model go.
        task: what to train.
        source: makes this worker's share of the batches.
        tell: told by the first worker.

    Raises:
        DivergedError: the loss became NaN or exploded; the last good checkpoint stays.
        ArtifactError: a part that is not what it was, or checkpoints of another training.
    """
    settings = task.settings
    group = WorkerGroup.current(sharded=settings.sharding == "fsdp")
    stream = source(group)
    trainer = Trainer(
        build_model(
            task.model,
            vocab_size=task.vocab_size,
            sequence_length=task.num_positions,
            seed=settings.seed,
            eos_id=load_tokenizer(task.tokenizer, task.eos_token).eos_id,
        ),
        stream,
        settings,
        device=choose_device(task.device, task.gpus),
        num_steps=task.num_steps,
        group=group,
        activation_checkpointing=settings.activation_checkpointing,
        stop_on_explosion=True,
        bos_id=task.bos_id,
    )
    history = History(task.num_steps)
    watch = _Watch(trainer, task, history, tell if group.rank == 0 else _nothing)
    fit(
        trainer,
        Checkpoints(store, task.checkpoints, task.identity, keep_last=settings.keep_last),
        group,
        num_steps=task.num_steps,
        checkpoint_every=task.checkpoint_every,
        on_step=watch.after_step,
        on_start=partial(_note_start, store, task, group, watch),
        beside={"history": history},
    )
    snapshot = trainer.snapshot()
    stream.close()
    if group.rank == 0:
        _commit(store, task, snapshot, history, trainer.order_sha256)
        watch.tell_now()


def starts_of(store: Store, checkpoints: str) -> list[dict[str, int]]:
    """Every time that a training began or went on: `step` and number of `workers`."""
    folder = store.path(CHECKPOINTS, checkpoints, "starts")
    return [numbered.read_version(folder, number) for number in numbered.versions(folder)]


def _note_start(
    store: Store, task: TrainTask, group: WorkerGroup, watch: "_Watch", step: int
) -> None:
    if group.rank == 0:
        content = {"step": step, "workers": group.size, "time": time.time()}
        numbered.append(store.path(CHECKPOINTS, task.checkpoints, "starts"), content)
    watch.began(step, group.size)


def _nothing(_: str, __: dict[str, Any]) -> None:
    """What the other workers tell."""


class _Watch:
    """Measures, keeps the history, and tells how far the training is, about every second."""

    def __init__(self, trainer: Trainer, task: TrainTask, history: History, tell: Tell) -> None:
        self._trainer, self._task, self._history, self._tell = trainer, task, history, tell
        self._heldout = read_heldout(task.heldout)
        self._points = evaluation_steps(task.num_steps, task.settings.eval_points)
        self._last: StepRecord | None = None
        self._told = time.monotonic()

    def began(self, step: int, num_workers: int) -> None:
        """The training begins, or goes on, after `step`."""
        self._tell("start", {"step": step, "workers": num_workers})

    def after_step(self, record: StepRecord) -> float | None:
        """The held-out loss, after the steps at which it is measured."""
        self._last = record
        point = self._history.add(record)
        if point is not None:
            self._tell("point", point)
        if time.monotonic() - self._told > _TELL_S:
            self.tell_now()
        if record.step not in self._points:
            return None
        trained = self._trainer.take_source_losses()
        if self._heldout is None:
            nll, by_source = record.loss, {}
        else:
            nll, by_source = measure(self._trainer, self._heldout.input_ids, self._heldout.pieces)
        self._tell("evaluation", self._history.evaluated(record, nll, by_source, trained))
        return nll if self._heldout is not None else None

    def tell_now(self) -> None:
        """Say how far the training is."""
        self._told = time.monotonic()
        if self._last is not None:
            self._tell("step", {"step": self._last.step, "tokens": self._last.tokens})


def _commit(
    store: Store, task: TrainTask, snapshot: Snapshot, history: History, order: str
) -> None:
    """Put the model, its tokenizer and what is known of its training into the store."""
    files = {n: read_bytes(f"{task.tokenizer}/{n}") for n in tokenizer_files(task.tokenizer)}
    found = history.state_dict()
    seconds, model = found["seconds"], _model_of(task, snapshot)

    def save(folder: Path) -> None:
        save_model(model, folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    put_folder(
        store,
        task.fingerprint,
        save,
        inputs={"data": task.identity["data"], "checkpoints": None},
        settings=task.identity,
        totals={
            "role": "target",
            "label": task.label,
            "num_tokens": snapshot.progress["tokens"],
            "num_steps": snapshot.progress["step"],
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "order_sha256": order,
            "final_loss": found["loss"],
            "curve": [[e["tokens"], e["nll"]] for e in found["evaluations"]]
            if task.heldout
            else [],
            "evaluations": found["evaluations"],
            "points": found["points"],
            "measured": {
                "seconds": seconds,
                "tokens_per_second": snapshot.progress["tokens"] / seconds,
                "data_wait_share": found["data_wait_s"] / seconds,
                "mfu": None if found["mfu_s"] is None else found["mfu_s"] / seconds,
                "halved_to": snapshot.progress["halved_to"],
                "starts": starts_of(store, task.checkpoints),
            },
        },
    )


def _model_of(task: TrainTask, snapshot: Snapshot) -> Any:
    """The trained model on the CPU, whole."""
    model = build_model(
        task.model,
        vocab_size=task.vocab_size,
        sequence_length=task.num_positions,
        seed=0,
        eos_id=load_tokenizer(task.tokenizer, task.eos_token).eos_id,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(snapshot.tensors[WEIGHT + name])
    return model
