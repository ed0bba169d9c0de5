"""What the mixing benchmarks share: arms and targets prepared in a store, runs without Ray."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.mixer import Mixer, MixerTask
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.policy import PolicySettings
from stillhouse.mixing.preparation import Lengths, SourceTask, prepare_source
from stillhouse.mixing.run import run_mix
from stillhouse.mixing.task import MixTask
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.text.tokenizer import Tokenizer, make_tokenizer, save_pretrained, train_tokenizer


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
    from stillhouse.text.tokenizer import load_tokenizer

    words = load_tokenizer(str(words_folder))
    store = Store(str(folder / "store"))
    parts: list[ArmPart] = []
    for name, rows in arms.items():
        receipt = _prepare(store, words, raw, name, rows, lengths)
        parts.append(ArmPart(name, receipt.parts[0].path, receipt.parts[0].num_rows))
    receipt = _prepare(store, words, raw, "target", target, lengths, is_target=True)
    return World(store, str(words_folder), words, tuple(parts), receipt.parts[0].path)


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
    key = fingerprint([name, list(rows), words.digest, lengths.input, lengths.target])
    found = store.finished("arms", [key])
    if key in found:
        return found[key]
    task = SourceTask(
        fingerprint=key,
        name=name,
        uris=(str(path),),
        where={},
        by=None,
        selection_tokenizer=None,
        lengths=lengths,
        split_text=True,
        max_examples=10_000,
        is_target=is_target,
    )
    return prepare_source(store, words, task)


def run_one(
    world: World,
    *,
    label: str,
    settings: PolicySettings,
    plan: StepPlan,
    seed: int,
    slots: int,
    num_steps: int,
    learning: Optimisation,
    init: str | ModelSettings,
    lengths: Lengths,
    num_shots: int,
    evaluate_every: int,
    initial_examples: int,
    patience: int | None = None,
    log_every: int = 1,
) -> Manifest:
    """One run to its end, or what a finished one left; a killed one goes on from its checkpoint."""
    learning = learning.model_copy(update={"seed": seed})
    start = init if isinstance(init, str) else init.model_dump()
    parts = [[part.name, part.uri] for part in world.arms]
    key = fingerprint(
        [
            *(label, settings.model_dump(), repr(plan), seed, slots, num_steps),
            *(learning.model_dump(), start, num_shots, evaluate_every, initial_examples),
            *(patience, world.target, parts),
        ]
    )
    found = world.store.find_manifest("models", key)
    if found is not None:
        return found
    mixer = MixerTask(
        settings=settings,
        arms=tuple(part.name for part in world.arms),
        sizes=tuple(part.num_rows for part in world.arms),
        slots=slots,
        seed=seed,
        log=world.store.path("decisions", key),
        log_every=log_every,
        regime={"seed": seed},
    )
    task = MixTask(
        fingerprint=key,
        label=label,
        seed=seed,
        init=init,
        encoder_decoder=True,
        arms=world.arms,
        target=world.target,
        num_shots=num_shots,
        tokenizer=world.tokenizer,
        eos_token=world.words.eos_token,
        max_input=lengths.input,
        max_target=lengths.target,
        plan=plan,
        num_steps=num_steps,
        learning=learning,
        optimizer="adamw",
        activation_checkpointing=False,
        initial_examples=initial_examples,
        evaluate_every=evaluate_every,
        patience=patience,
        mixer=mixer,
    )
    return run_mix(world.store, task, Mixer(mixer), device=torch.device("cpu"))


def write_json(path: Path, content: Any) -> None:
    """As people read it."""
    path.write_text(json.dumps(content, indent=1) + "\n")
