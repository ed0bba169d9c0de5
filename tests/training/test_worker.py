"""A training's worker, alone in this process: resumed, committed, refused; a training's history."""

from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
from architectures import own_nll
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load
from training_parts import LENGTH, write_part
from trainings import tokens_of, train_task

from stillhouse.errors import ArtifactError, DivergedError
from stillhouse.fingerprint import sha256
from stillhouse.selection.scorers import LanguageModelHost
from stillhouse.spec import ScoringSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import read_table
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.loop import StepRecord
from stillhouse.training.order import NO_SAMPLES, chain
from stillhouse.training.run import History, evaluation_steps, starts_of
from stillhouse.training.seen import read_seen, trained_rows
from stillhouse.training.spec import TrainingSettings
from stillhouse.training.task import StartModel
from stillhouse.training.worker import streamed_batches, train_worker

STEPS, PART_ROWS = 12, (20, 12)
OPTIMISATION = set(TrainingSettings.model_fields)


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

    def make(num_steps=STEPS, **changes):
        settings = {"lanes": 4, "window": 6, "eval_points": 3, "keep_last": 1}
        settings |= {"checkpoint_every": 4}
        learning = {name: changes.pop(name) for name in [*changes] if name in OPTIMISATION}
        parts = tokens_of(folder / "0.parquet", folder / "1.parquet")
        held = tokens_of(folder / "2.parquet", name="heldout")
        options = {"heldout": held, "settings": settings | learning} | changes
        return train_task(options.pop("data", parts), tokenizer, num_steps, **options)

    return make


@pytest.fixture
def local(tmp_path):
    return Store(check_store(str(tmp_path / "local")))


class LostError(Exception):
    pass


def run(store, task, stop=None):
    """Train, or raise after the point of step `stop`; the events."""
    events = []

    def tell(kind, content):
        events.append((kind, content))
        if stop is not None and kind == "point" and content["step"] == stop:
            raise LostError

    fetch = read_ahead(PartReader.of(task.data), 8)
    train_worker(store, task, partial(streamed_batches, task, fetch), tell)
    return events


def test_killed_at_any_step_it_ends_in_the_same_bytes(store, task, local):
    """On a folder and on S3; the uninterrupted one is trained in another store."""
    events = run(local, task())
    model = local.get_manifest("models", task().fingerprint)
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
        [p[k] for k in computed] for kind, p in events if kind == "point"
    ]
    assert len(resumed.totals["measured"]["starts"]) == 3


def chain_by_hand(order):
    """The digest over the order's rows: of every lane two a step, window after window."""
    lanes = []
    for lane in range(4):
        windows = order.windows(range(lane, lane + 1), 0, STEPS)
        lanes.append(np.concatenate([w.samples()[w.permutation()] for w in windows]))
    digest = NO_SAMPLES
    for step in range(STEPS):
        digest = chain(digest, np.concatenate([rows[2 * step : 2 * step + 2] for rows in lanes]))
    return digest.hex()


def test_what_is_committed(task, local):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    events = run(local, task())
    made = local.get_manifest("models", task().fingerprint)
    totals = made.totals
    assert totals["num_tokens"] == STEPS * 8 * LENGTH and totals["num_steps"] == STEPS
    assert [tokens // (8 * LENGTH) for tokens, _ in totals["curve"]] == [4, 8, 12]
    assert totals["curve"][-1][1] < totals["curve"][0][1]
    last = totals["evaluations"][-1]
    assert set(last["heldout"]) == {"sea", "s2"} and set(last["trained"]) == {"sea", "s0", "s1"}
    assert sum(one["num_tokens"] for one in last["trained"].values()) == 4 * 8 * (LENGTH - 1)
    assert events[0] == ("start", {"step": 0, "workers": 1})
    assert totals["order_sha256"] == chain_by_hand(task().order())
    folder = folder_of(local, task())
    for name, wanted in made.files.items():
        assert sha256(read_bytes(f"{folder}/{name}")) == wanted
    batch = AutoTokenizer.from_pretrained(folder)("the ship wind", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(input_ids=batch["input_ids"]).logits.isfinite().all()


def test_a_loss_that_explodes_commits_no_model(task, local):
    wild = task(learning_rate=1e38, warmup=0.5, schedule="constant", max_grad_norm=1e9)
    with pytest.raises(DivergedError, match=r"step \d+ of 12: loss .* \(sources in the batch: s0"):
        run(local, wild)
    assert local.find_manifest("models", wild.fingerprint) is None


def test_tokens_of_another_tokenizer_are_refused(task, local):
    with pytest.raises(
        ArtifactError, match=r"data set 'pool' has the token id 2\d\d, the tokenizer"
    ):
        run(local, replace(task(), vocab_size=200))


def test_nothing_is_read_beyond_the_last_step(task, local):
    """Twelve steps of eight are three epochs of 32 rows: each lane's windows, three times."""
    read = []

    def fetch(windows):
        for window in windows:
            read.append((window.lane, window.epoch, window.index))
            yield PartReader.of(task().data).read(window)

    train_worker(local, task(), partial(streamed_batches, task(), fetch), lambda *_: None)
    assert len(read) == len(set(read))
    assert {epoch for _, epoch, _ in read} == {0, 1, 2}


@given(st.integers(1, 200), st.integers(1, 20))
def test_evaluation_steps(num_steps, points):
    found = evaluation_steps(num_steps, points)
    assert max(found) == num_steps and min(found) >= 1
    assert len(found) <= points


def folder_of(store, task):
    return store.path("models", task.fingerprint)


def test_only_chosen_rows_are_trained_on_and_recorded(task, local):
    """Three rows of each part, for two passes; the model's folder records rows and documents."""
    store = local
    rows = np.array([1, 4, 9])
    whole = task().data[0]
    data = replace(whole, rows=(3, 3), chosen=(rows, rows))
    some = task(num_steps=6, data=data, lanes=1, global_batch=2, window=100)
    asked = []

    def source(group):
        stream = streamed_batches(some, read_ahead(PartReader.of(some.data), 8), group)
        next_batch = stream.next_batch
        stream.next_batch = lambda: asked.append(next_batch()) or asked[-1]
        return stream

    train_worker(store, some, source, lambda *_: None)
    samples = np.concatenate([batch.samples for batch in asked]).tolist()
    everything = sorted([part, row] for part in range(2) for row in rows.tolist())
    assert sorted(samples[:6]) == sorted(samples[6:]) == everything
    for batch in asked:
        for (part, row), ids in zip(batch.samples.tolist(), batch.inputs.tolist(), strict=True):
            assert ids == pq.read_table(whole.uris[part])["input_ids"][row].as_py()
    here, beside = trained_rows(folder_of(store, some), whole.digests)
    assert {k: v.tolist() for k, v in here.items()} == {key: [1, 4, 9] for key in whole.digests}
    assert beside == {}
    seen = {k: v.tolist() for k, v in read_seen(folder_of(store, some)).items()}
    assert seen == {key: [[1, 2], [4, 5], [9, 10]] for key in whole.digests}


def test_part_of_a_pass_is_recorded_exactly(task, local):
    store = local
    short = task(num_steps=2)
    run(store, short)
    order, wanted = short.order(), set()
    for lane in range(4):  # two rows a step of each lane
        samples = [w.samples()[w.permutation()] for w in order.windows(range(lane, lane + 1), 0, 2)]
        wanted |= {(part, row) for part, row in np.concatenate(samples)[:4].tolist()}
    ranges = read_seen(folder_of(store, short))
    digests = short.data[0].digests
    found = {
        (digests.index(file), row)
        for file, both in ranges.items()
        for first, last in both.tolist()
        for row in range(first, last)
    }
    assert found == wanted and len(wanted) == 16


def test_a_model_to_start_from(task, local):
    """Its weights, its weights and moments, or only its architecture."""
    store = local
    first = task(schedule="constant", warmup=0.0)
    run(store, first)
    init = StartModel(folder_of(store, first), "a" * 64)
    still = {"learning_rate": 1e-30, "num_steps": 1}
    for start, same in ((init, True), (replace(init, fresh=True), False)):
        begun = task(init=start, **still)
        run(store, begun)
        config = [
            store.get_manifest("models", t.fingerprint).files["config.json"] for t in (first, begun)
        ]
        assert config[0] == config[1]
        weights = [
            load(read_bytes(f"{folder_of(store, t)}/model.safetensors")) for t in (first, begun)
        ]
        assert same == all(np.allclose(weights[0][n], weights[1][n]) for n in weights[0])
    steps = {}
    for moments in (None, first.checkpoints):
        tuned = task(init=replace(init, moments=moments), schedule="constant", warmup=0.0)
        events = run(store, tuned)
        steps[moments] = [p["loss"] for kind, p in events if kind == "point"]
    assert steps[None][0] == steps[first.checkpoints][0]
    assert steps[None][1] != steps[first.checkpoints][1]
    gone = task(init=replace(init, moments="b" * 64))
    with pytest.raises(ArtifactError, match=r"moments are gone \(`init.optimizer: fresh`\)"):
        run(store, gone)


def test_checkpoints_are_kept_only_if_asked(task, local):
    """`keep_last` is no part of a model's name."""
    run(local, task(keep_last=0))
    assert Checkpoints(local, task().checkpoints).steps() == []
    run(local, task(seed=3))
    assert Checkpoints(local, task(seed=3).checkpoints).steps() != []


def test_a_bos_token_stands_before_every_sequence(task, local):
    """In training, in what is measured on the way, and in scoring; the parts have none."""
    from transformers import AutoModelForCausalLM

    store, bos = local, 7
    begun = task(bos_id=bos)
    run(store, begun)
    made = store.get_manifest("models", begun.fingerprint)
    model = AutoModelForCausalLM.from_pretrained(folder_of(store, begun))
    tokens = read_table(begun.heldout.uris[0])
    expected = own_nll(model, np.array(tokens["input_ids"].to_pylist()), before=bos)
    assert model.config.max_position_embeddings == LENGTH + 1
    assert made.totals["curve"][-1][1] == pytest.approx(expected.mean(), abs=1e-5)
    host = LanguageModelHost(folder_of(store, begun), ScoringSettings(), "cpu", 0, 1, bos)
    scores = host.build(store).score(tokens)["value"].to_numpy()
    np.testing.assert_allclose(scores, expected.mean(1), atol=1e-5)


def record(step, seconds, mfu):
    return StepRecord(
        step=step,
        tokens=100 * step,
        loss=1.0,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens_per_s=100 / seconds,
        seconds=seconds,
        data_wait_s=seconds / 10,
        micro_batch=1,
        mfu=mfu,
    )


def test_times_and_utilisation_are_of_the_whole_training():
    """A slow first step (it compiles) weighs as long as it took, over a resume too."""
    first, second, unknown = (
        History(1000, 1, lambda *_: None, lambda _: ({}, None)) for _ in range(3)
    )
    first.add(record(1, 8.0, 0.1))
    second.load_state_dict(first.state_dict())
    for step, seconds in ((2, 1.0), (3, 1.0)):
        second.add(record(step, seconds, 0.6))
    found = second.state_dict()
    assert (found["seconds"], found["data_wait_s"]) == pytest.approx((10.0, 1.0))
    assert found["mfu_s"] / found["seconds"] == pytest.approx(0.2)  # (8 x 0.1 + 2 x 0.6) / 10
    unknown.add(record(1, 1.0, None))
    assert unknown.state_dict()["mfu_s"] is None
