"""Several workers on gloo have the losses, order and results of one: two real processes."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from training_parts import BATCH, LENGTH, STEPS, make_trainer, write_parts

from stillhouse.models.causal_lm import layers_of
from stillhouse.models.scoring import ScoringModel
from stillhouse.storage.artifact import Store
from stillhouse.training.checkpoint import Checkpoints, Snapshot, fit
from stillhouse.training.evaluate import measure
from stillhouse.training.group import WorkerGroup

HELDOUT = np.random.default_rng(5).integers(0, 64, (7, LENGTH))


def results(trainer, steps=STEPS):
    losses = [trainer.step().loss for _ in range(steps)]
    return {
        "losses": losses,
        "order": trainer.order_sha256,
        "sources": {name: asdict(found) for name, found in trainer.take_source_losses().items()},
        "heldout": measure(trainer, HELDOUT)[0],
    }


def worker(rank, folder, uris):
    """One of two processes: train replicated and sharded, and write the results."""
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
    checkpoints = Checkpoints(Store(folder), "f" * 64)
    options = {"num_steps": STEPS, "checkpoint_every": 5}
    start = fit(
        resumed, checkpoints, group, on_step=lambda record: losses.append(record.loss), **options
    )
    assert start == 40
    Path(folder, f"resumed-{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def share_of(trainer):
    """The share of the weights that this process holds."""
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
def trained(tmp_path_factory):
    """The folder with two processes' results, the parts, and one process's results."""
    folder = tmp_path_factory.mktemp("group")
    uris = write_parts(folder)
    alone = make_trainer(uris)
    first = results(alone, 40)
    write_state(folder, "alone", alone.snapshot())
    with Checkpoints(Store(str(folder)), "f" * 64) as checkpoints:
        checkpoints.save(alone.snapshot())
    rest = results(alone, 10)
    whole = rest | {"losses": first["losses"] + rest["losses"]}
    torch.multiprocessing.spawn(worker, (str(folder), uris), nprocs=2)
    return folder, uris, whole


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_two_workers_train_as_one(trained, mode):
    folder, _, alone = trained
    found = [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0].pop("share") == {"replicated": 1, "sharded": 0.5}[mode]
    assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found[0]["order"] == alone["order"]
    assert found[0]["heldout"] == pytest.approx(alone["heldout"], rel=1e-5)


def test_losses_by_source_agree(trained):
    first, other = (
        json.loads((trained[0] / f"{mode}-0.json").read_text())["sources"]
        for mode in ("replicated", "sharded")
    )
    assert first.keys() == other.keys() == {"sea", "s0", "s1", "s2"}
    for name, loss in first.items():
        assert loss["num_tokens"] == other[name]["num_tokens"]
        assert loss["nll"] == pytest.approx(other[name]["nll"], rel=1e-5)
    tokens = sum(loss["num_tokens"] for loss in first.values())
    assert tokens == STEPS * BATCH * (LENGTH - 1)


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_one_worker_resumes_from_two(trained, mode):
    folder, uris, _ = trained
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


def test_two_sharded_workers_resume_from_one(trained):
    folder, _, alone = trained
    losses = json.loads((folder / "resumed-0.json").read_text())
    assert losses == pytest.approx(alone["losses"][40:], rel=1e-5)
    loaded = Checkpoints(Store(str(folder)), "f" * 64).load_newest()
    assert loaded.progress["step"] == STEPS
    assert loaded.progress["order_sha256"] == alone["order"]


def test_memory_savings_change_no_losses(trained):
    """Micro-batches up to rounding, activation checkpointing not at all."""
    _, uris, alone = trained
    trainer = make_trainer(uris, micro_batch=5)
    losses = [trainer.step().loss for _ in range(STEPS)]
    assert losses == pytest.approx(alone["losses"], rel=1e-5)
    trainer = make_trainer(uris, activation_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in layers_of(trainer._model))
    assert [trainer.step().loss for _ in range(10)] == alone["losses"][:10]


def test_resumed_alone_it_has_the_same_bits(trained):
    folder, uris, alone = trained
    resumed = make_trainer(uris)
    resumed.restore(read_state(folder, "alone"))
    assert [resumed.step().loss for _ in range(10)] == alone["losses"][40:]
    assert resumed.order_sha256 == alone["order"]


def test_evaluation_agrees_with_the_scoring_model(trained):
    trainer = make_trainer(trained[1])
    for _ in range(3):
        trainer.step()
    scorer = ScoringModel(trainer._model, dtype=torch.float32)
    assert measure(trainer, HELDOUT)[0] == pytest.approx(measure(scorer, HELDOUT)[0], rel=1e-6)
