"""One training as a task: read the sequences, train, measure, and keep the model in the store."""

from collections.abc import Callable
from pathlib import Path
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
    load_model,
    save_model,
)
from stillhouse.models.scoring import ScoringModel
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import list_names, read_bytes
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import parquet_bytes, read_table
from stillhouse.text.pieces import token_ids
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.batches import TokenBatches
from stillhouse.training.divergence import late_fall
from stillhouse.training.evaluate import heldout_nll
from stillhouse.training.loop import train
from stillhouse.training.task import TRAINED_ON, DataPart, ModelTask, SameArchitecture

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def run_training(store: Store, task: ModelTask, on_step: Callable[[int, int], None]) -> Manifest:
    """Train the model of a task and commit it; `on_step(step, num_steps)` is told of progress.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    device = choose_device(task.device, task.gpus)
    model = _start(task, device)
    data = read_sequences(store, task.data)
    batch = task.settings.batch_size
    num_steps = max(1, round(task.num_tokens / (task.sequence_length * batch)))
    source = TokenBatches(data, batch_size=batch, seed=task.seed)
    heldout = read_sequences(store, [DataPart(path) for path in task.heldout])
    measured = ScoringModel(model, dtype=torch.float32, bos_id=task.bos_id)
    curve: list[tuple[int, float]] = []
    points = evaluation_steps(num_steps, task.eval_points) if len(heldout) else set()

    def after(step: int) -> None:
        on_step(step, num_steps)
        if step in points:
            nll = heldout_nll(measured, heldout)
            curve.append((step * batch * task.sequence_length, nll))

    result = train(
        model,
        source,
        task.settings,
        device=device,
        num_steps=num_steps,
        on_step=after,
        bos_id=task.bos_id,
    )
    files = {
        name: read_bytes(f"{task.tokenizer}/{name}") for name in tokenizer_files(task.tokenizer)
    }

    def save(folder: Path) -> None:
        save_model(model, folder)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if any(part.rows is not None for part in task.data):
            (folder / TRAINED_ON).write_bytes(parquet_bytes(_trained_on(task)))

    return put_folder(
        store,
        task.fingerprint,
        save,
        inputs=task.inputs,
        settings=task.settings.model_dump(exclude={"path", "pin"}),
        totals={
            "role": task.role,
            "label": task.label,
            "num_tokens": num_steps * batch * task.sequence_length,
            "num_steps": num_steps,
            "curve": curve,
            "final_loss": result.losses[-1],
            "late_fall": late_fall(result.losses),
        },
    )


def _start(task: ModelTask, device: torch.device) -> PreTrainedModel:
    """The model as it is before the first step."""
    if isinstance(task.init, str):
        return load_model(task.init, dtype="float32", device=device)
    if isinstance(task.init, SameArchitecture):
        return build_like(task.init.folder, seed=task.seed)
    return build_model(
        task.init,
        vocab_size=task.vocab_size,
        sequence_length=task.num_positions,
        seed=task.seed,
        eos_id=load_tokenizer(task.tokenizer, task.eos_token).eos_id,
    )


def tokenizer_files(folder: str) -> list[str]:
    """Names of a tokenizer's files in a folder."""
    there = list_names(folder)
    return [name for name in TOKENIZER_FILES if name in there]


def _trained_on(task: ModelTask) -> pa.Table:
    """Addresses of the sequences that a model was trained on: token part (sha256) and row."""
    chosen = [(part.sha256, part.rows) for part in task.data if part.rows is not None]
    names = np.repeat([sha for sha, _ in chosen], [len(rows) for _, rows in chosen])
    rows = np.concatenate([rows for _, rows in chosen])
    return pa.table({"part": pa.array(names).dictionary_encode(), "row": pa.array(rows)})


def evaluation_steps(num_steps: int, points: int) -> set[int]:
    """Steps to measure after, evenly spaced, the last one among them."""
    return {round(num_steps * (i + 1) / points) for i in range(points)} - {0}


def read_sequences(store: Store, parts: list[DataPart] | tuple[DataPart, ...]) -> NDArray[Any]:
    """The sequences of some parts as one array [N, T], in the type they are stored in."""
    arrays: list[NDArray[Any]] = []
    for part in parts:
        ids = token_ids(read_table(store.path(part.path), ["input_ids"]))
        arrays.append(ids if part.rows is None else ids[part.rows])
    return np.concatenate(arrays) if arrays else np.zeros((0, 0), np.uint16)
