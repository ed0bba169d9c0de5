"""A small world to select from: text in four styles, made up word by word from a seed."""

import hashlib
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from stillhouse.spec import SelectSpec

STYLES = {
    style: words.split()
    for style, words in {
        "sea": "the ship wind wave sail harbour captain rope deck storm gull salt anchor tide",
        "code": "def return import class self value index list dict error none true raise file",
        "law": "shall party section act court order claim notice person state term clause law",
        "food": "salt butter flour oven sugar egg bake stir cup bowl spoon dough cream milk pan",
    }.items()
}
MODEL = {"hidden_size": 32, "num_layers": 1}
LEARNING = {"learning_rate": 1e-2, "global_batch": 8}
DIGITS = {
    "job": "distill",
    "data": {"dataset": "digits", "num_images": 300},
    "evaluate": {"seeds": 2, "epochs": 4, "full": {"epochs": 1}},
}
TEACHER_NETWORK = {"name": "convnet", "depth": 2, "width": 4, "norm": "batch"}
CLASSIFY = {
    "job": "train",
    "task": "classify",
    "data": DIGITS["data"],
    "network": TEACHER_NETWORK,
    "train": {"num_epochs": 1, "global_batch": 32, "eval_points": 1},
}
"""A classifier that can teach a distillation, in seconds."""
MTT = {
    "network": {"name": "convnet", "depth": 2, "width": 4},
    "preprocessing": {"augmentation": ["crop", "scale"]},
    "experts": {"count": 2, "epochs": 3, "batch_size": 128},
    "method": {
        "name": "mtt",
        "images_per_class": 2,
        "num_iterations": 4,
        "num_steps": 3,
        "evaluate_every": 2,
    },
}
"""Together with `DIGITS`: trajectory matching that takes seconds."""


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.steps = []
        self.advanced = []

    def begin(self, step, total, reused, unit):
        self.steps.append((step, total, reused))

    def advance(self, step, done, amount):
        self.advanced.append((step, done, amount))

    def end(self, step, seconds):
        pass

    def note(self, kind, content):
        pass


def document(rng, style):
    """40 to 120 words: mostly the style's own, in runs that a small model can learn."""
    words = STYLES[style]
    text = []
    while len(text) < rng.randint(40, 120):
        at = rng.randrange(len(words))
        text += [words[(at + step) % len(words)] for step in range(rng.randint(2, 5))]
    return " ".join(text)


def rows(seed, count, styles, prefix="d"):
    rng = random.Random(seed)
    return [
        {"id": f"{prefix}{i}", "text": document(rng, style), "source": style}
        for i in range(count)
        for style in [styles[i % len(styles)]]
    ]


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), path)


def write_shard(folder, shard, per_shard=120):
    found = rows(100 + shard, per_shard, list(STYLES), prefix=f"s{shard}-")
    write(folder / "pool" / f"pool-{shard:02d}.parquet", found)


def small_training(folder, num_steps, **changes):
    """A training on a world's pool with a held-out loss; `changes` are top-level sections."""
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"path": str(folder / "pool" / "*.parquet")},
        "heldout": {"path": str(folder / "target" / "*.parquet")},
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 32,
        "model": MODEL,
        "train": {"num_tokens": 32 * 8 * num_steps, "dtype": "float32", **LEARNING},
        "compute": {"trainers": 1, "packers": 1},
    }
    return content | changes


def own_packages(folder):
    """A user's project with packages called as our folders are; importing one is an error."""
    for name in ("actors", "jobs", "pipelines"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('the package of a user')\n")
    return folder


def make_world(folder, shards=4, per_shard=120):
    """A pool of four styles in shards, and a target of one of them."""
    for shard in range(shards):
        write_shard(folder, shard, per_shard)
    write(folder / "target" / "sea.parquet", rows(7, 160, ["sea"], prefix="t"))
    return folder


def small_spec(folder, **changes):
    """A spec that runs in seconds; `changes` are top-level sections."""
    spec = {
        "job": "select",
        "store": str(folder / "store"),
        "pool": {"path": str(folder / "pool" / "*.parquet")},
        "target": {"path": str(folder / "target" / "*.parquet"), "heldout": 0.2},
        "tokenizer": {"train": {"vocab_size": 400}},
        "sequence_length": 32,
        "part_tokens": 4000,
        "prior": {"model": MODEL, "num_tokens": 6000, **LEARNING},
        "conditional": {"epochs": 1, **LEARNING},
        "selection": {"tau": 8},
        "compute": {"scorers": 1, "trainers": 1, "packers": 1},
    }
    return spec | changes


def parse(folder, **changes):
    return SelectSpec.model_validate(small_spec(folder, **changes))


def make_models(folder):
    """A tokenizer and two models that no training has seen, as sections of a spec."""
    from stillhouse.models.causal_lm import build_model, save_model
    from stillhouse.spec import ModelSettings
    from stillhouse.text.tokenizer import make_tokenizer, save_pretrained, train_tokenizer

    texts = [" ".join(words) for words in STYLES.values()] * 5
    tokenizer = make_tokenizer(train_tokenizer(texts, vocab_size=300), None)
    save_pretrained(tokenizer, str(folder / "tokenizer"), model_max_length=32)
    shape = ModelSettings(**MODEL)
    for seed, name in enumerate(("prior", "conditional")):
        model = build_model(
            shape,
            vocab_size=tokenizer.vocab_size,
            sequence_length=32,
            seed=seed,
            eos_id=tokenizer.eos_id,
        )
        save_model(model, folder / name)
    return {n: {"path": str(folder / n)} for n in ("tokenizer", "prior", "conditional")}


def write_spec(folder, **changes):
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(folder, **changes)))
    return str(path)


def about(folder):
    """Where the manifest and the other files lie of an artifact whose folder holds only rows."""
    folder = Path(folder)
    return folder.parent / "about" / folder.name


def digests(store, *kinds):
    """sha256 of every file under these kinds of a store (all of them by default), by path.

    A receipt or a scores manifest may name what made it; parts and selections may not differ.
    """
    root = Path(store)
    places = [root / kind for kind in kinds] if kinds else [root]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for place in places
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
