"""Several workers on gloo: the losses, order and results of one. Two real processes, once."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_loop import model
from test_stream import write_part

from stillhouse.models.scoring import ScoringModel, layers_of
from stillhouse.spec import Optimisation
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.evaluate import measure
from stillhouse.training.fetch import PartReader, read_ahead
from stillhouse.training.fit import fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.loop import Trainer
from stillhouse.training.order import Rows, SampleOrder, check_workers
from stillhouse.training.state import Snapshot
from stillhouse.training.stream import TokenStream

CPU = torch.device("cpu")
PART_ROWS = (30, 25, 41)
LENGTH, BATCH, LANES, STEPS = 6, 12, 3, 50  # three lanes: one worker of two has two of them
HELDOUT = np.random.default_rng(5).integers(0, 64, (7, LENGTH))


def write_parts(folder):
    uris = [str(folder / f"{i}.parquet") for i in range(len(PART_ROWS))]
    rng = np.random.default_rng(0)
    for i, (uri, rows) in enumerate(zip(uris, PART_ROWS, strict=True)):
        ids = (rng.integers(0, 64, (rows, 1)) + np.arange(LENGTH)) % 64
        write_part(uri, ids.astype(np.uint16), ["sea", f"s{i}"])
    return uris


def make_trainer(uris, group=None, micro_batch=None, **options):
    group = group or WorkerGroup()
    order = SampleOrder([Rows(PART_ROWS)], global_batch=BATCH, seed=0, lanes=LANES, window=10)
    fetch = read_ahead(PartReader(uris), 10)
    stream = TokenStream(order, fetch, rank=group.rank, num_workers=group.size)
    learning = Optimisation(learning_rate=3e-3, global_batch=BATCH, micro_batch=micro_batch)
    return Trainer(model(), stream, learning, device=CPU, num_steps=STEPS, group=group, **options)


def results(trainer, steps=STEPS):
    losses = [trainer.step().loss for _ in range(steps)]
    return {
        "losses": losses,
        "order": trainer.order_sha256,
        "sources": {name: asdict(found) for name, found in trainer.take_source_losses().items()},
        "heldout": measure(trainer, HELDOUT)[0],
    }


def worker(rank, folder, uris):
    """One of two processes: trains replicated and sharded, and writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for sharded in (False, True):
        group = WorkerGroup.current(sharded=sharded)
        trainer = make_trainer(uris, group, micro_batch=4)
        found = results(trainer)
        name = f"{'sharded' if sharded else 'replicated'}-{rank}"
        found["share"] = share_of(trainer)
        Path(folder, f"{name}.json").write_text(json.dumps(found))
        state = trainer.snapshot()
        if rank == 0:
            write_state(folder, name, state)
    group = WorkerGroup.current(sharded=True)
    resumed = make_trainer(uris, group, micro_batch=4)
    losses = []
    checkpoints = Checkpoints(Store(folder), "f" * 64, {})
    options = {"num_steps": STEPS, "checkpoint_every": 5}
    start = fit(
        resumed, checkpoints, group, on_step=lambda record: losses.append(record.loss), **options
    )
    assert start == 40
    Path(folder, f"resumed-{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def share_of(trainer):
    """The part of the weights that this process holds."""
    weights = list(trainer._model.parameters())
    mine = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
    return sum(w.numel() for w in mine) / sum(w.numel() for w in weights)


def write_state(folder, name, state):
    save_file(state.tensors, Path(folder, f"{name}.safetensors"))
    Path(folder, f"{name}.progress").write_text(json.dumps(state.progress))


def read_state(folder, name):
    progress = json.loads(Path(folder, f"{name}.progress").read_text())
    return Snapshot(load_file(Path(folder, f"{name}.safetensors")), progress)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What one process and two saw: the folder, the parts, and the results of one."""
    folder = tmp_path_factory.mktemp("group")
    uris = write_parts(folder)
    alone = make_trainer(uris)
    first = results(alone, 40)
    write_state(folder, "alone", alone.snapshot())
    with Checkpoints(Store(str(folder)), "f" * 64, {}) as checkpoints:
        checkpoints.save(alone.snapshot())
    rest = results(alone, 10)
    whole = rest | {"losses": first["losses"] + rest["losses"]}
    torch.multiprocessing.spawn(worker, (str(folder), uris), nprocs=2)
    return folder, uris, whole


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_two_workers_train_as_one(seen, mode):
    folder, _, alone = seen
    found = [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0].pop("share") == {"replicated": 1, "sharded": 0.5}[mode]
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found[0]["order"] == alone["order"]
    assert found[0]["heldout"] == pytest.approx(alone["heldout"], rel=1e-5)


def test_the_two_ways_agree(seen):
    folder = seen[0]
    first, other = (
        json.loads((folder / f"{mode}-0.json").read_text()) for mode in ("replicated", "sharded")
    )
    assert first["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert first["sources"].keys() == {"sea", "s0", "s1", "s2"}
    for name, loss in first["sources"].items():
        assert loss["num_tokens"] == other["sources"][name]["num_tokens"]
        assert loss["nll"] == pytest.approx(other["sources"][name]["nll"], rel=1e-5)
    tokens = sum(loss["num_tokens"] for loss in first["sources"].values())
    assert tokens == STEPS * BATCH * (LENGTH - 1)


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_one_worker_goes_on_from_two(seen, mode):
    folder, uris, _ = seen
    state = read_state(folder, f"{mode}-0")
    alone, resumed = make_trainer(uris), make_trainer(uris)
    resumed.restore(state)
    for _ in range(STEPS):
        alone.step()
    assert resumed.order_sha256 == alone.order_sha256
    for _ in range(5):
        assert resumed.step().loss == pytest.approx(alone.step().loss, rel=1e-5)
    assert resumed.snapshot().tensors.keys() == alone.snapshot().tensors.keys()
    assert state.tensors.keys() == alone.snapshot().tensors.keys()


def test_two_sharded_workers_go_on_from_one(seen):
    folder, _, alone = seen
    losses = json.loads((folder / "resumed-0.json").read_text())
    assert losses == pytest.approx(alone["losses"][40:], rel=1e-5)
    loaded = Checkpoints(Store(str(folder)), "f" * 64, {}).load_newest()
    assert loaded.step == STEPS and loaded.snapshot.progress["order_sha256"] == alone["order"]


@pytest.mark.parametrize("micro_batch", [6, 3])
def test_accumulation_gives_the_same_losses(seen, micro_batch):
    _, uris, alone = seen
    trainer = make_trainer(uris, micro_batch=micro_batch)
    losses = [trainer.step().loss for _ in range(STEPS)]
    assert losses == pytest.approx(alone["losses"], rel=1e-5)


def test_activation_checkpointing_changes_nothing(seen):
    _, uris, alone = seen
    trainer = make_trainer(uris, activation_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in layers_of(trainer._model))
    assert [trainer.step().loss for _ in range(10)] == alone["losses"][:10]


def test_resumed_from_a_stream_gives_the_same_bits(seen):
    folder, uris, alone = seen
    resumed = make_trainer(uris)
    resumed.restore(read_state(folder, "alone"))
    assert [resumed.step().loss for _ in range(10)] == alone["losses"][40:]
    assert resumed.order_sha256 == alone["order"]


def test_evaluation_is_the_scorers(seen):
    trainer = make_trainer(seen[1])
    for _ in range(3):
        trainer.step()
    scorer = ScoringModel(trainer._model, dtype=torch.float32)
    assert measure(trainer, HELDOUT)[0] == pytest.approx(measure(scorer, HELDOUT)[0], rel=1e-6)


def test_a_worker_alone_needs_no_others():
    group = WorkerGroup.current()
    assert (group.rank, group.size, group.sharded) == (0, 1, False)
    samples = np.array([[1, 2], [3, 4]])
    assert group.gather_samples(samples).tolist() == samples.tolist()
    assert group.gather({"a": 1}) == [{"a": 1}]
    with pytest.raises(Exception, match="does not divide"):
        check_workers(SampleOrder([Rows([9])], global_batch=3, seed=0, lanes=3, window=4), 2)
