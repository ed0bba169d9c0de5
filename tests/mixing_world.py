"""A small world for mixing: a target that maps words, arms that do the same or something else.

Also a small `job: mix` on it as a spec file's content: three tasks and a selection are its arms.
"""

import io
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from stillhouse.fingerprint import sha256
from stillhouse.jobs.spec_file import load_spec
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.policy import StepPlan
from stillhouse.mixing.preparation import SourceTask
from stillhouse.mixing.spec import MixModel, MixTask, MixTraining, Rule
from stillhouse.mixing.static import Uniform
from stillhouse.storage.artifact import Manifest, PartRef, Store
from stillhouse.storage.commit import create
from stillhouse.storage.folders import put_folder
from stillhouse.storage.task import commit
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


def target_rows():
    """24 rows to learn from and 20 to test on."""
    splits = (("train", 24, 7), ("test", 20, 8))
    return [row for split, *of in splits for row in with_choices(rows_of("good", *of), split)]


def write_tokenizer(folder):
    texts = [f"{r['input']} {r['target']}" for k in ARMS for r in rows_of(k, 50, 9)]
    tokenizer = make_tokenizer(train_tokenizer(texts, vocab_size=300), None)
    save_pretrained(tokenizer, str(folder), model_max_length=512)
    return tokenizer


def put_text_selection(store, tokenizer, texts, length=16):
    """A selection of whole sequences of these texts, and the tokenizer of its tokens; its URI."""
    put_folder(
        store,
        "f" * 64,
        lambda folder: save_pretrained(tokenizer, str(folder), model_max_length=512),
        inputs={},
        settings={},
        totals={"role": "tokenizer", "digest": tokenizer.digest},
    )
    encoded = tokenizer.encode_batch(texts)
    ids = [i for text in encoded for i in (*text.tolist(), tokenizer.eos_id)]
    kept = np.array(ids[: len(ids) // length * length], np.uint16)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(kept, length)}), buffer)
    path, data = "selections/parts/kept.parquet", buffer.getvalue()
    create(store.path(path), data)
    part = PartRef(path, len(kept) // length, len(kept), len(data), sha256(data))
    settings = {"tokenizer": {"digest": tokenizer.digest}}
    store.put_manifest(Manifest("selections", "kept", (part,), {}, settings))
    return store.path("selections", "kept")


def source_task(name, uri, **changes):
    values = {
        "name": name,
        "uris": (uri,),
        "digests": (uri,),
        "where": {},
        "by": None,
        "selection": None,
        "tokenizer": "",
        "max_input": 32,
        "max_target": 8,
        "split_text": True,
        "max_examples": 10_000,
    }
    return SourceTask(**values | changes)


def prepare(store, tokenizer, task):
    return commit(store, task, task.run(store, tokenizer, None))


def make_world(folder):
    """A store with three arms and a target, and what makes a `mix_task` of them."""
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer = write_tokenizer(folder / "tokenizer")
    store = Store(str(folder / "store"))
    arms = []
    for i, name in enumerate(ARMS):
        uri = write_rows(folder / f"{name}.parquet", rows_of(name, 60, i))
        (part,) = prepare(store, tokenizer, source_task(name, uri)).parts
        arms.append(ArmPart(name, part.path, part.num_rows, part.sha256))
    uri = write_rows(folder / "target.parquet", target_rows())
    (part,) = prepare(store, tokenizer, source_task("target", uri, is_target=True)).parts
    return store, partial(mix_task, folder, store, arms, part.path)


def mix_task(folder, store, parts, target, *, policy=None, plan=None, slots=4, steps=12, **changes):
    """A small run; `label` names it, keys of `train` are given one by one, others are fields."""
    policy = policy or Uniform(name="uniform")
    label = changes.pop("label", policy.label)
    learning = {
        "micro_batch": 4,
        "learning_rate": 3e-3,
        "optimizer": "adamw",
        "warmup": 0.05,
        "evaluate_every": 4,
        "patience": None,
    }
    given = {key: changes.pop(key) for key in list(changes) if key in MixTraining.model_fields}
    kind = "decoder" if changes.pop("decoder", False) else "encoder_decoder"
    values = {
        "rule": Rule(label, policy, plan or StepPlan(2, "alignment"), slots, steps),
        "seed": 0,
        "decided_by": {"label": label},
        "model": MixModel(hidden_size=32, num_layers=1, kind=kind),
        "init": None,
        "reference": None,
        "arms": tuple(parts),
        "target": target,
        "num_shots": 16,
        "tokenizer": str(folder / "tokenizer"),
        "tokenizer_digest": "",
        "eos_token": "<|endoftext|>",
        "bos_id": None,
        "max_input": 32,
        "max_target": 8,
        "train": MixTraining(**learning | given),
        "log": store.path("runs", "r", "decisions", label),
        "log_every": 2,
    }
    return MixTask(**values | changes)


def write_data(folder):
    """Target, arms, a tokenizer, and a store with a selection."""
    rows = [row | {"task": "ring"} for row in target_rows()]
    write_rows(folder / "target.parquet", rows)
    arms = [
        r | {"task": kind}
        for i, kind in enumerate(("good", "other", "noise"))
        for r in rows_of(kind, 40, i)
    ]
    arms.append({"input": "red " * 60, "target": "zzz", "task": "noise"})  # longer than the model
    arms.append({"input": "red", "target": "zzz", "task": None})  # of no arm
    write_rows(folder / "arms.parquet", arms)
    (folder / "tokenizer").mkdir()
    tokenizer = write_tokenizer(folder / "tokenizer")
    texts = [f"{row['input']} {row['target']}" for row in rows_of("good", 40, 5)]
    put_text_selection(Store(str(folder / "kept")), tokenizer, texts)
    return folder


def by_task(data):
    """The source of the three tasks."""
    return {"path": str(data / "arms.parquet"), "by": "task"}


def write_spec(data, name, **changes):
    """The path of a spec; `changes` are top-level keys, those of `train` are added to it."""
    train = {
        "num_steps": 12,
        "micro_batch": 4,
        "accumulation": 5,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "evaluate_every": 6,
        "patience": None,
    }
    content = {
        "job": "mix",
        "store": str(data / "store"),
        "target": {
            "path": str(data / "target.parquet"),
            "where": {"task": "ring"},
            "num_shots": 16,
        },
        "auxiliary": [by_task(data), {"selection": str(data / "kept" / "selections" / "kept")}],
        "tokenizer": {"path": str(data / "tokenizer")},
        "model": {"kind": "encoder_decoder", "hidden_size": 32, "num_layers": 1},
        "policy": {"name": "ucb1", "reward": "aggregate", "initial_examples": 8},
        "max_input_tokens": 32,
        "max_target_tokens": 8,
        "log_every": 5,
    }
    content |= changes | {"train": train | changes.get("train", {})}
    path = data / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def parse(data, name="spec", **changes):
    """A spec as a file's: from YAML."""
    return load_spec(write_spec(data, name, **changes), [])
