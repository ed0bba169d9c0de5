"""What each worker of a training does, from the order of its data to the model artifact.

    order -> fetch -> TokenStream -> Trainer -> fit (checkpoints) -> the first worker commits

A worker that is called again, in another process and with another number of workers, continues from
the newest checkpoint.
"""

import time
from collections.abc import Callable
from copy import deepcopy
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
from stillhouse.spec import ModelSettings
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table
from stillhouse.storage.task import identity
from stillhouse.text.pieces import Pieces, read_pieces, token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.checkpoint import WEIGHT, Checkpoints, Snapshot, fit, newest_moments
from stillhouse.training.evaluate import measure
from stillhouse.training.fetch import Fetch
from stillhouse.training.group import WorkerGroup
from stillhouse.training.loop import StepRecord, Trainer
from stillhouse.training.objectives import make_objective, signals_of
from stillhouse.training.online import Ask, OnlineBatches
from stillhouse.training.optimisation import late_fall
from stillhouse.training.seen import SEEN, documents_seen, seen_bytes, trained_on_bytes
from stillhouse.training.signals import COLUMNS, column
from stillhouse.training.stream import BatchSource, TokenStream
from stillhouse.training.task import CHECKPOINTS, LOSS_MASK, TRAINED_ON, Tell, TokenSet, TrainTask

_TELL_S = 1.0
_MAX_POINTS = 500


def signals_wanted(task: TrainTask) -> list[str]:
    """The columns of the batches beside the tokens: a mask only if a data set has one."""
    masked = any(one.masked for one in task.data)
    wanted = signals_of(task.settings.full_objective, task.code)
    own = [name for name in wanted if masked or name != LOSS_MASK]
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
    """
    settings = task.settings
    group = group or WorkerGroup()
    stream = source(group)
    trainer = Trainer(
        start_model(task),
        stream,
        settings,
        device=choose_device(task.device, task.gpus),
        num_steps=task.num_steps,
        objective=partial(make_objective, settings.full_objective, task.code),
        group=group,
        activation_checkpointing=settings.activation_checkpointing,
        stop_on_explosion=True,
        bos_id=task.bos_id,
    )
    if not isinstance(task.init, ModelSettings) and task.init.moments is not None:
        trainer.take_moments(newest_moments(store, task.init.moments))
    history = History(trainer, task, tell if group.rank == 0 else lambda *_: None)
    checkpoints = Checkpoints(store, task.checkpoints, keep_last=max(1, settings.keep_last))

    def on_start(step: int) -> None:
        if group.rank == 0:
            content = {"step": step, "workers": group.size, "time": time.time()}
            numbered.append(store.path(CHECKPOINTS, task.checkpoints, "starts"), content)
            tell("start", {"step": step, "workers": group.size})

    assert settings.checkpoint_every is not None
    fit(
        trainer,
        checkpoints,
        group,
        num_steps=task.num_steps,
        checkpoint_every=settings.checkpoint_every,
        on_step=history.add,
        on_start=on_start,
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
        _commit(store, task, snapshot, history.state_dict(), files)
        if not settings.keep_last:
            checkpoints.remove_all()
        history.tell_step()


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


def starts_of(store: Store, checkpoints: str) -> list[dict[str, int]]:
    """Every start of a training, the first and those after a loss: `step` and `workers`."""
    folder = store.path(CHECKPOINTS, checkpoints, "starts")
    return [numbered.read_version(folder, number) for number in numbered.versions(folder)]


def evaluation_steps(num_steps: int, points: int) -> set[int]:
    """Steps to evaluate after, evenly spaced, the last one included."""
    return {round(num_steps * (i + 1) / points) for i in range(points)} - {0}


class _Heldout:
    """All sequences [N, T] of some parts; documents and mask [N, T] if all parts have them."""

    def __init__(self, parts: TokenSet) -> None:
        tables = [read_table(uri) for uri in parts.uris]
        columns = [
            name
            for name in ("input_ids", "documents", LOSS_MASK)
            if all(name in table.column_names for table in tables)
        ]
        table = pa.concat_tables([table.select(columns) for table in tables])
        self.input_ids = token_ids(table)
        self.pieces: Pieces | None = read_pieces(table) if "documents" in columns else None
        self.mask: NDArray[np.float32] | None = None
        if LOSS_MASK in columns:
            values = table[LOSS_MASK].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            self.mask = values.astype(np.float32).reshape(self.input_ids.shape)


class History:
    """A training's curves, evaluations and times, kept in its checkpoints and told as they come.

    Losses are means over runs of steps, at most 500 in a training. Only what is computed is equal
    for equal trainings; seconds are as measured.
    """

    def __init__(self, trainer: Trainer, task: TrainTask, tell: Tell) -> None:
        self._trainer, self._tell, self._num_steps = trainer, tell, task.num_steps
        self._heldout = None if task.heldout is None else _Heldout(task.heldout)
        self._evaluations = evaluation_steps(task.num_steps, task.settings.eval_points)
        self._every = -(-task.num_steps // _MAX_POINTS)
        self._run: list[StepRecord] = []
        self._last: StepRecord | None = None
        self._told = time.monotonic()
        self._state: dict[str, Any] = {
            "points": [],
            "evaluations": [],
            "loss": None,
            "seconds": 0.0,
            "data_wait_s": 0.0,
            "mfu_s": None,
        }

    def add(self, record: StepRecord) -> float | None:
        """Add a step; the held-out loss if it is measured after this step."""
        state, self._last = self._state, record
        state["seconds"] += record.seconds
        state["data_wait_s"] += record.data_wait_s
        state["loss"] = record.loss
        if record.mfu is not None:
            state["mfu_s"] = (state["mfu_s"] or 0.0) + record.mfu * record.seconds
        self._run.append(record)
        if record.step % self._every == 0 or record.step == self._num_steps:
            self._add_point()
        if time.monotonic() - self._told > _TELL_S:
            self.tell_step()
        return self._evaluate(record) if record.step in self._evaluations else None

    def _add_point(self) -> None:
        run, last = self._run, self._run[-1]
        seconds = sum(r.seconds for r in run)
        first = run[0].tokens - run[0].tokens_per_s * run[0].seconds
        point = {
            "step": last.step,
            "tokens": last.tokens,
            "loss": sum(r.loss for r in run) / len(run),
            "grad_norm": max(r.grad_norm for r in run),
            "learning_rate": last.learning_rate,
            "tokens_per_s": (last.tokens - first) / seconds,
            "data_wait_share": sum(r.data_wait_s for r in run) / seconds,
        }
        self._run = []
        self._state["points"].append(point)
        self._tell("point", point)

    def _evaluate(self, record: StepRecord) -> float | None:
        trained, held = self._trainer.take_source_losses(), self._heldout
        nll, by_source = record.loss, {}
        if held is not None:
            nll, by_source = measure(self._trainer, held.input_ids, held.pieces, held.mask)
        evaluation = {
            "step": record.step,
            "tokens": record.tokens,
            "nll": nll,
            "heldout": {name: asdict(loss) for name, loss in by_source.items()},
            "trained": {name: asdict(loss) for name, loss in trained.items()},
        }
        self._state["evaluations"].append(evaluation)
        self._tell("evaluation", evaluation)
        return nll if held is not None else None

    def tell_step(self) -> None:
        """Tell the last step."""
        self._told = time.monotonic()
        if self._last is not None:
            self._tell("step", {"step": self._last.step, "tokens": self._last.tokens})

    def state_dict(self) -> dict[str, Any]:
        return {**deepcopy(self._state), "run": [asdict(record) for record in self._run]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._run = [StepRecord(**record) for record in state["run"]]
        self._state = {key: deepcopy(value) for key, value in state.items() if key != "run"}


def _commit(
    store: Store,
    task: TrainTask,
    snapshot: Snapshot,
    history: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    """Write the model, its tokenizer and the training's history to the store."""
    progress, seconds, model = snapshot.progress, history["seconds"], start_model(task, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(snapshot.tensors[WEIGHT + name])
    evaluations = history["evaluations"]
    sets = [{"weight": one.weight, "parts": one.identity()} for one in task.data]
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
        inputs={"data": {"sets": sets, "heldout": task.heldout and task.heldout.identity()}},
        settings={"model": identity(task.init), "train": train, "tokenizer": tokenizer},
        totals={
            "role": task.role,
            "label": task.label,
            "num_tokens": progress["tokens"],
            "num_steps": progress["step"],
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "order_sha256": progress["order_sha256"],
            "final_loss": history["loss"],
            "late_fall": late_fall([point["loss"] for point in history["points"]]),
            "curve": [[e["tokens"], e["nll"]] for e in evaluations] if task.heldout else [],
            "evaluations": evaluations,
            "points": history["points"],
            "measured": {
                "seconds": seconds,
                "tokens_per_second": progress["tokens"] / seconds,
                "data_wait_share": history["data_wait_s"] / seconds,
                "mfu": None if history["mfu_s"] is None else history["mfu_s"] / seconds,
                "halved_to": progress["halved_to"],
                "starts": starts_of(store, task.checkpoints),
            },
        },
    )
