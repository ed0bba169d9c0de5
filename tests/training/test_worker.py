"""A worker of a streamed training, alone in this process: resumed, committed, refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_stream import LENGTH, write_part

from stillhouse.errors import ArtifactError, DivergedError
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.spec import ModelSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import read_bytes
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.order import NO_SAMPLES, Rows, chain
from stillhouse.training.spec import TrainingSettings
from stillhouse.training.task import TrainTask
from stillhouse.training.worker import starts_of, streamed_batches, train_worker

STEPS, PART_ROWS = 12, (20, 12)


@pytest.fixture(scope="module")
def place(untrained, tmp_path_factory):
    """Two parts to train on, one held out, and a tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    for i, rows in enumerate((*PART_ROWS, 6)):
        ids = (rng.integers(0, 250, (rows, 1)) + np.arange(LENGTH)) % 250
        write_part(str(folder / f"{i}.parquet"), ids.astype(np.uint16), ["sea", f"s{i}"])
    return folder, untrained["tokenizer"]["path"]


@pytest.fixture
def task(place):
    folder, tokenizer = place

    def make(**changes):
        learning = {"learning_rate": 1e-2, "global_batch": 8, "lanes": 4, "window": 6}
        learning |= {"eval_points": 3, "keep_last": 1}
        settings = TrainingSettings(**(learning | changes))
        identity = {"train": settings.model_dump(mode="json"), "data": {"sets": 1}}
        name = fingerprint(identity)
        return TrainTask(
            fingerprint=name,
            checkpoints=fingerprint(["checkpoints", name]),
            label="small",
            identity=identity,
            parts=(str(folder / "0.parquet"), str(folder / "1.parquet")),
            datasets=(Rows(PART_ROWS),),
            names=("pool",),
            heldout=(str(folder / "2.parquet"),),
            sequence_length=LENGTH,
            vocab_size=300,
            tokenizer=tokenizer,
            eos_token="<|endoftext|>",
            model=ModelSettings(hidden_size=32, num_layers=1),
            settings=settings,
            num_steps=STEPS,
            checkpoint_every=4,
            device="cpu",
            gpus=0,
        )

    return make


class LostError(Exception):
    pass


def run(store, task, stop=None):
    """Train; a worker that hears of `stop` dies. What was told."""
    told = []

    def tell(kind, content):
        told.append((kind, content))
        if stop is not None and kind == "point" and content["step"] == stop:
            raise LostError

    fetch = read_ahead(PartReader(task.parts), 8)
    train_worker(store, task, partial(streamed_batches, task, fetch), tell)
    return told


def test_killed_at_any_step_it_ends_in_the_same_bytes(store, task, tmp_path):
    """On a folder and on S3; the uninterrupted one is trained in another store."""
    whole = Store(check_store(str(tmp_path / "whole")))
    told = run(whole, task())
    model = whole.get_manifest("models", task().fingerprint)
    for stop in (3, 9):
        with pytest.raises(LostError):
            run(store, task(), stop)
    run(store, task())
    resumed = store.get_manifest("models", task().fingerprint)
    assert resumed.files == model.files
    assert starts_of(store, task().checkpoints) == [
        start | {"step": step, "workers": 1}
        for start, step in zip(starts_of(store, task().checkpoints), (0, 0, 8), strict=True)
    ]
    same = ("num_tokens", "num_steps", "order_sha256", "curve", "evaluations", "final_loss")
    assert {k: resumed.totals[k] for k in same} == {k: model.totals[k] for k in same}
    computed = ("step", "tokens", "loss", "grad_norm", "learning_rate")
    assert [[p[k] for k in computed] for p in resumed.totals["points"]] == [
        [p[k] for k in computed] for kind, p in told if kind == "point"
    ]
    assert len(resumed.totals["measured"]["starts"]) == 3


def chain_by_hand(order):
    """The chain over the order's rows: of every lane two a step, window after window."""
    lanes = []
    for lane in range(4):
        windows = order.windows(range(lane, lane + 1), 0, STEPS)
        lanes.append(np.concatenate([w.samples()[w.permutation()] for w in windows]))
    digest = NO_SAMPLES
    for step in range(STEPS):
        digest = chain(digest, np.concatenate([rows[2 * step : 2 * step + 2] for rows in lanes]))
    return digest.hex()


def test_what_is_committed(task, tmp_path):
    store = Store(check_store(str(tmp_path / "store")))
    told = run(store, task())
    made = store.get_manifest("models", task().fingerprint)
    totals = made.totals
    assert totals["num_tokens"] == STEPS * 8 * LENGTH and totals["num_steps"] == STEPS
    assert [tokens // (8 * LENGTH) for tokens, _ in totals["curve"]] == [4, 8, 12]
    assert totals["curve"][-1][1] < totals["curve"][0][1]
    last = totals["evaluations"][-1]
    assert set(last["heldout"]) == {"sea", "s2"} and set(last["trained"]) == {"sea", "s0", "s1"}
    assert sum(one["num_tokens"] for one in last["trained"].values()) == 4 * 8 * (LENGTH - 1)
    assert told[0] == ("start", {"step": 0, "workers": 1})
    assert totals["order_sha256"] == chain_by_hand(task().order())
    for name, wanted in made.files.items():
        assert sha256(read_bytes(store.path("models", made.fingerprint, name))) == wanted


def test_the_model_opens_in_transformers(task, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store(check_store(str(tmp_path / "store")))
    run(store, task())
    folder = store.path("models", task().fingerprint)
    words = AutoTokenizer.from_pretrained(folder)
    batch = words("the ship wind", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(input_ids=batch["input_ids"]).logits.isfinite().all()


def test_another_spec_under_the_same_name_is_refused(task, tmp_path):
    store = Store(check_store(str(tmp_path / "store")))
    with pytest.raises(LostError):
        run(store, task(), stop=5)
    mixed = replace(task(seed=1), checkpoints=task().checkpoints)
    with pytest.raises(ArtifactError, match=r"`train.seed` is 0 there and 1 here"):
        run(store, mixed)


def test_a_loss_that_explodes_keeps_the_last_good_checkpoint(task, tmp_path):
    store = Store(check_store(str(tmp_path / "store")))
    wild = task(learning_rate=1e38, warmup=0.5, schedule="constant", max_grad_norm=1e9)
    with pytest.raises(DivergedError, match=r"step \d+ of 12: loss .* \(sources in the batch: s0"):
        run(store, wild)
    assert store.find_manifest("models", wild.fingerprint) is None


def test_tokens_of_another_tokenizer_are_noticed(task, tmp_path):
    store = Store(check_store(str(tmp_path / "store")))
    small = TrainTask(**{n: getattr(task(), n) for n in TrainTask.__slots__} | {"vocab_size": 200})
    with pytest.raises(
        ArtifactError, match=r"data set 'pool' has the token id 2\d\d, the tokenizer"
    ):
        run(store, small)


def test_nothing_is_read_behind_the_last_step(task, tmp_path):
    """Twelve steps of eight are three epochs of 32 rows: each lane's windows, three times."""
    store = Store(check_store(str(tmp_path / "store")))
    asked = []

    def fetch(windows):
        for window in windows:
            asked.append((window.lane, window.epoch, window.index))
            yield PartReader(task().parts).read(window)

    train_worker(store, task(), partial(streamed_batches, task(), fetch), lambda *_: None)
    assert len(asked) == len(set(asked))
    assert {epoch for _, epoch, _ in asked} == {0, 1, 2}
    assert Path(store.path("models", task().fingerprint, "manifest.json")).exists()
