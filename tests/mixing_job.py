"""A small `job: mix` as a spec file's content: three tasks and a selection are its arms."""

import yaml
from mixing_world import (
    put_text_selection,
    rows_of,
    with_choices,
    write_rows,
    write_tokenizer,
)

from stillhouse.jobs.spec_file import load_spec
from stillhouse.storage.artifact import Store


def write_data(folder):
    """Target, arms, a tokenizer, and a store with a selection."""
    target = with_choices(rows_of("good", 24, 7), "train") + with_choices(
        rows_of("good", 20, 8), "test"
    )
    write_rows(folder / "target.parquet", [r | {"task": "ring"} for r in target])
    arms = [
        r | {"task": kind}
        for i, kind in enumerate(("good", "other", "noise"))
        for r in rows_of(kind, 40, i)
    ]
    arms.append({"input": "red " * 60, "target": "zzz", "task": "noise"})  # longer than the model
    arms.append({"input": "red", "target": "zzz", "task": None})  # of no arm
    write_rows(folder / "arms.parquet", arms)
    (folder / "tokenizer").mkdir()
    words = write_tokenizer(folder / "tokenizer")
    texts = [f"{row['input']} {row['target']}" for row in rows_of("good", 40, 5)]
    put_text_selection(Store(str(folder / "kept")), words, texts)
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
