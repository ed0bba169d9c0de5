"""A small world for mixing: a target that maps words, arms that do the same or something else."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.fingerprint import sha256
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.mixer import MixerTask
from stillhouse.mixing.plan import StepPlan
from stillhouse.mixing.preparation import Lengths, SourceTask, prepare_source
from stillhouse.mixing.task import MixTask
from stillhouse.mixing.uniform import UniformSettings
from stillhouse.spec import ModelSettings, Optimisation
from stillhouse.storage.artifact import Manifest, PartRef, Store
from stillhouse.storage.commit import create
from stillhouse.storage.folders import put_folder
from stillhouse.text.tokenizer import make_tokenizer, save_pretrained, train_tokenizer

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star"]
ARMS = ("good", "other", "noise")


def rows_of(kind, count, seed):
    """`good` answers with the word after the first in a ring, as the target does."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        i, j = rng.integers(0, len(WORDS), 2)
        after = WORDS[(i + 1) % len(WORDS)]
        answer = {"good": after, "other": WORDS[j], "noise": "zzz"}[kind]
        rows.append({"input": f"{WORDS[i]} then {WORDS[j]}", "target": answer})
    return rows


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def with_choices(rows, split):
    return [r | {"choices": sorted({r["target"], "red", "zzz"}), "split": split} for r in rows]


def write_tokenizer(folder):
    texts = [f"{r['input']} {r['target']}" for k in ARMS for r in rows_of(k, 50, 9)]
    words = make_tokenizer(train_tokenizer(texts, vocab_size=300), None)
    save_pretrained(words, str(folder), model_max_length=512)
    return words


def put_text_selection(store, words, texts, length=16):
    """A selection of whole sequences of these texts, and the tokenizer of its tokens; its URI."""
    put_folder(
        store,
        "f" * 64,
        lambda folder: save_pretrained(words, str(folder), model_max_length=512),
        inputs={},
        settings={},
        totals={"role": "tokenizer", "digest": words.digest},
    )
    ids = [i for text in texts for i in [*words.encode_batch([text])[0].tolist(), words.eos_id]]
    kept = np.array(ids[: len(ids) // length * length], np.uint16)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(kept, length)}), buffer)
    path, data = "selections/parts/kept.parquet", buffer.getvalue()
    create(store.path(path), data)
    part = PartRef(path, len(kept) // length, len(kept), len(data), sha256(data))
    settings = {"tokenizer": {"digest": words.digest}}
    store.put_manifest(Manifest("selections", "kept", (part,), {}, settings))
    return store.path("selections", "kept")


def source_task(name, uri, **changes):
    values = {
        "fingerprint": f"task-{name}",
        "name": name,
        "uris": (uri,),
        "where": {},
        "by": None,
        "selection_tokenizer": None,
        "lengths": Lengths(32, 8),
        "split_text": True,
        "max_examples": 10_000,
    }
    return SourceTask(**values | changes)


def make_world(folder):
    """A store with three arms and a target; (store, words, arm parts, target part)."""
    (folder / "tokenizer").mkdir(parents=True)
    words = write_tokenizer(folder / "tokenizer")
    store = Store(str(folder / "store"))
    parts = []
    for i, name in enumerate(ARMS):
        uri = write_rows(folder / f"{name}.parquet", rows_of(name, 60, i))
        receipt = prepare_source(store, words, source_task(name, uri))
        parts.append(ArmPart(name, receipt.parts[0].path, receipt.parts[0].num_rows))
    target = with_choices(rows_of("good", 24, 7), "train")
    target += with_choices(rows_of("good", 20, 8), "test")
    uri = write_rows(folder / "target.parquet", target)
    receipt = prepare_source(store, words, source_task("target", uri, is_target=True))
    return store, words, parts, receipt.parts[0].path


def mix_task(folder, store, parts, target, *, settings=None, slots=4, steps=12, **changes):
    settings = settings or UniformSettings(name="uniform")
    plan = changes.pop("plan", StepPlan(2, "alignment"))
    seed = changes.get("seed", 0)
    label = changes.get("label", settings.name)
    mixer = MixerTask(
        settings=settings,
        arms=tuple(part.name for part in parts),
        sizes=tuple(part.num_rows for part in parts),
        slots=slots,
        seed=seed,
        log=store.path("runs", "r", "decisions", label),
        log_every=2,
        regime={"seed": seed},
    )
    values = {
        "fingerprint": f"{label}-{seed}".ljust(64, "0"),
        "label": label,
        "seed": seed,
        "init": ModelSettings(hidden_size=32, num_layers=1, tie_embeddings=False),
        "encoder_decoder": True,
        "arms": tuple(parts),
        "target": target,
        "num_shots": 16,
        "tokenizer": str(folder / "tokenizer"),
        "eos_token": "<|endoftext|>",
        "max_input": 32,
        "max_target": 8,
        "plan": plan,
        "num_steps": steps,
        "learning": Optimisation(learning_rate=3e-3, micro_batch=4, schedule="constant", seed=seed),
        "optimizer": "adamw",
        "activation_checkpointing": False,
        "initial_examples": 8,
        "evaluate_every": 4,
        "patience": None,
        "mixer": mixer,
    }
    return MixTask(**values | changes)
