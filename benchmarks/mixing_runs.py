"""What the mixing benchmarks share: arms and targets prepared in a store, runs without Ray."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.preparation import SourceTask
from stillhouse.mixing.run import run_mix
from stillhouse.mixing.spec import MixModel, MixTask, MixTraining, Rule, StoredModel
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.task import commit
from stillhouse.text.tokenizer import (
    Tokenizer,
    load_tokenizer,
    make_tokenizer,
    save_pretrained,
    train_tokenizer,
)

Lengths = tuple[int, int]
"""Longest input and target in tokens."""


def options(text: str | None, *, seeds: int) -> argparse.ArgumentParser:
    """What every benchmark of many runs is asked."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seeds", type=int, default=seeds)
    return parser


@dataclass(frozen=True, slots=True)
class World:
    """A store with prepared arms and a target."""

    store: Store
    tokenizer: str
    words: Tokenizer
    arms: tuple[ArmPart, ...]
    target: str
    lengths: Lengths


def make_world(
    folder: Path,
    arms: Mapping[str, Sequence[dict[str, Any]]],
    target: Sequence[dict[str, Any]],
    *,
    vocab_size: int,
    lengths: Lengths,
) -> World:
    """Train a tokenizer on all texts and prepare everything; equal inputs give equal parts."""
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    words_folder = folder / f"tokenizer-{vocab_size}"
    if not words_folder.exists():
        words_folder.mkdir()
        rows = [row for of in [*arms.values(), target] for row in of]
        texts = (" ".join(str(row.get(k, "")) for k in ("input", "target", "text")) for row in rows)
        words = make_tokenizer(train_tokenizer(texts, vocab_size=vocab_size), None)
        save_pretrained(words, str(words_folder), model_max_length=1_000_000)
    words = load_tokenizer(str(words_folder))
    store = Store(str(folder / "store"))
    parts: list[ArmPart] = []
    for name, rows in arms.items():
        receipt = _prepare(store, words, raw, name, rows, lengths)
        (part,) = receipt.parts
        parts.append(ArmPart(name, part.path, part.num_rows, part.sha256))
    receipt = _prepare(store, words, raw, "target", target, lengths, is_target=True)
    return World(store, str(words_folder), words, tuple(parts), receipt.parts[0].path, lengths)


def _prepare(
    store: Store,
    words: Tokenizer,
    raw: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    lengths: Lengths,
    *,
    is_target: bool = False,
) -> Any:
    path = raw / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    task = SourceTask(
        name=name,
        uris=(str(path),),
        digests=(fingerprint(list(rows)),),
        where={},
        by=None,
        selection=None,
        tokenizer=words.digest,
        max_input=lengths[0],
        max_target=lengths[1],
        split_text=True,
        max_examples=10_000,
        is_target=is_target,
    )
    found = store.finished("arms", [task.fingerprint])
    return found.get(task.fingerprint) or commit(store, task, task.run(store, words, None))


def task_of(
    world: World,
    rule: Rule,
    *,
    seed: int,
    train: MixTraining,
    model: MixModel,
    num_shots: int,
    init: str | None = None,
    log_every: int = 1,
) -> MixTask:
    """A run; `init` is the folder of the model that it starts from."""
    task = MixTask(
        rule=rule,
        seed=seed,
        decided_by={"label": rule.label} | rule.policy.model_dump(mode="json"),
        model=model,
        init=None if init is None else StoredModel(init, init),
        reference=None,
        arms=world.arms,
        target=world.target,
        num_shots=num_shots,
        tokenizer=world.tokenizer,
        tokenizer_digest=world.words.digest,
        eos_token=world.words.eos_token,
        bos_id=None,
        max_input=world.lengths[0],
        max_target=world.lengths[1],
        train=train,
        log="",
        log_every=log_every,
    )
    return replace(task, log=world.store.path("decisions", task.fingerprint))


def run_one(world: World, task: MixTask) -> Manifest:
    """One run to its end, or what a finished one left; a killed one goes on from its checkpoint."""
    found = world.store.find_manifest("models", task.fingerprint)
    return found or run_mix(world.store, task, Mixer(task), device=torch.device("cpu"))


def write_json(path: Path, content: Any) -> None:
    """As people read it."""
    path.write_text(json.dumps(content, indent=1) + "\n")
