"""What each worker of a training does, from the order of its data to the model artifact.

    order -> fetch -> TokenStream -> Trainer -> fit (checkpoints) -> the first worker commits

A worker that is called again, in another process and beside another number of workers, goes on
from the newest checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from stillhouse.models.causal_lm import (
    build_like,
    build_model,
    choose_device,
    commit_model,
    load_model,
)
from stillhouse.spec import ModelSettings
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.pieces import Pieces, read_pieces, token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.batches import BatchSource
from stillhouse.training.checkpoint import Checkpoints, newest_moments
from stillhouse.training.divergence import late_fall
from stillhouse.training.evaluate import measure
from stillhouse.training.fetch import Fetch
from stillhouse.training.fit import fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.history import History
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.objectives import make_objective, signals_of
from stillhouse.training.online import Ask, OnlineBatches
from stillhouse.training.seen import SEEN, documents_seen, seen_bytes, trained_on_bytes
from stillhouse.training.spec import minimised
from stillhouse.training.state import WEIGHT, Snapshot
from stillhouse.training.stream import TokenStream
from stillhouse.training.task import CHECKPOINTS, LOSS_MASK, TRAINED_ON, Tell, TokenSet, TrainTask

_TELL_S = 1.0


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out sequences [N, T], where the parts tell them their documents, and their mask [N, T]
    of tokens that count.
    """

    input_ids: NDArray[Any]
    pieces: Pieces | None
    mask: NDArray[np.float32] | None


def read_heldout(heldout: TokenSet | None) -> Heldout | None:
    """All sequences of some token parts; None where there are no parts."""
    if heldout is None:
        return None
    tables = [read_table(uri) for uri in heldout.uris]
    columns = [
        name
        for name in ("input_ids", "documents", LOSS_MASK)
        if all(name in table.column_names for table in tables)
    ]
    table = pa.concat_tables([table.select(columns) for table in tables])
    ids = token_ids(table)
    mask = None
    if LOSS_MASK in columns:
        values = table[LOSS_MASK].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        mask = values.astype(np.float32).reshape(ids.shape)
    return Heldout(ids, read_pieces(table) if "documents" in columns else None, mask)


def signals_wanted(task: TrainTask) -> list[str]:
    """The columns that batches carry: a mask only where a data set has one."""
    masked = any(one.masked for one in task.data)
    return [n for n in signals_of(minimised(task.settings), task.code) if masked or n != LOSS_MASK]


def streamed_batches(task: TrainTask, fetch: Fetch, group: WorkerGroup) -> BatchSource:
    """All samples of a task in its order; `fetch` reads the windows of its parts."""
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
    """The best of each window of candidates, as scorers see them."""
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
    """Train, from the newest checkpoint where there is one, and commit the model.

    Args:
        store: where checkpoints and model go.
        task: what to train.
        source: makes this worker's share of the batches.
        tell: told by the first worker.
        group: the workers, all of which call this; default this process alone.

    Raises:
        DivergedError: the loss became NaN or exploded; the last good checkpoint stays.
        ArtifactError: a part that is not what it was, or checkpoints of another training.
    """
    settings = task.settings
    group = group or WorkerGroup()
    stream = source(group)
    model = start_model(task)
    trainer = Trainer(
        model,
        stream,
        settings,
        device=choose_device(task.device, task.gpus),
        num_steps=task.num_steps,
        objective=partial(make_objective, minimised(settings), task.code),
        group=group,
        activation_checkpointing=settings.activation_checkpointing,
        stop_on_explosion=True,
        bos_id=task.bos_id,
    )
    if not isinstance(task.init, ModelSettings) and task.init.moments is not None:
        trainer.take_moments(newest_moments(store, task.init.moments))
    history = History(task.num_steps)
    watch = _Watch(trainer, task, history, tell if group.rank == 0 else _nothing)
    checkpoints = Checkpoints(
        store, task.checkpoints, task.identity, keep_last=max(1, settings.keep_last)
    )
    assert settings.checkpoint_every is not None
    fit(
        trainer,
        checkpoints,
        group,
        num_steps=task.num_steps,
        checkpoint_every=settings.checkpoint_every,
        on_step=watch.after_step,
        on_start=partial(_note_start, store, task, group, watch),
        beside={"history": history},
    )
    snapshot = trainer.snapshot()
    stream.close()
    seen = group.gather(documents_seen(task, group.rank, group.size))
    if group.rank == 0:
        files = {SEEN: seen_bytes(seen)}
        chosen = trained_on_bytes(task.data)
        if chosen is not None:
            files[TRAINED_ON] = chosen
        _commit(store, task, snapshot, history, trainer.order_sha256, files)
        if not settings.keep_last:
            checkpoints.remove_all()
        watch.tell_now()


def start_model(task: TrainTask, seed: int | None = None) -> PreTrainedModel:
    """The float32 model on the CPU, as it is before the first step."""
    if not isinstance(task.init, ModelSettings):
        if task.init.fresh:
            return build_like(task.init.folder, seed=task.settings.seed)
        return load_model(task.init.folder, dtype="float32", device=torch.device("cpu"))
    return build_model(
        task.init,
        vocab_size=task.vocab_size,
        sequence_length=task.num_positions,
        seed=task.settings.seed if seed is None else seed,
        eos_id=load_tokenizer(task.tokenizer, task.eos_token).eos_id,
    )


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


def evaluation_steps(num_steps: int, points: int) -> set[int]:
    """Steps to measure after, evenly spaced, the last one among them."""
    return {round(num_steps * (i + 1) / points) for i in range(points)} - {0}


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
        trained, held = self._trainer.take_source_losses(), self._heldout
        nll, by_source = record.loss, {}
        if held is not None:
            nll, by_source = measure(self._trainer, held.input_ids, held.pieces, held.mask)
        self._tell("evaluation", self._history.evaluated(record, nll, by_source, trained))
        return nll if held is not None else None

    def tell_now(self) -> None:
        """Say how far the training is."""
        self._told = time.monotonic()
        if self._last is not None:
            self._tell("step", {"step": self._last.step, "tokens": self._last.tokens})


def _commit(
    store: Store,
    task: TrainTask,
    snapshot: Snapshot,
    history: History,
    order: str,
    files: dict[str, bytes],
) -> None:
    """Put the model, its tokenizer and what is known of its training into the store."""
    found = history.state_dict()
    seconds, model = found["seconds"], start_model(task, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(snapshot.tensors[WEIGHT + name])
    commit_model(
        store,
        task.fingerprint,
        model,
        task.tokenizer,
        files=files,
        inputs={"data": task.identity["data"], "checkpoints": None},
        settings=task.identity,
        totals={
            "role": task.role,
            "label": task.label,
            "num_tokens": snapshot.progress["tokens"],
            "num_steps": snapshot.progress["step"],
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "order_sha256": order,
            "final_loss": found["loss"],
            "late_fall": late_fall([point["loss"] for point in found["points"]]),
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
