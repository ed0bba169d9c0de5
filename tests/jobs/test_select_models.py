"""The models of `job: select` on real Ray: any number of workers, a killed one, other weights."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small import LEARNING, MODEL, Quiet, parse
from workers import Killer

from stillhouse.jobs.run import run_job
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table

PRIOR = {"model": MODEL, "num_tokens": 12_000, "dtype": "float32", **LEARNING}
STEPS = round(12_000 // 32 / 8)


def select(world, store, trainers, shown=None, **changes):
    compute = {"scorers": 2, "trainers": trainers, "packers": 1}
    spec = parse(world, store=str(store), compute=compute, prior=PRIOR, **changes)
    return run_job(spec, shown or Quiet())


def starts_of(shown):
    """Training, step and workers of every start."""
    return [(one["training"], one["step"], one["workers"]) for one in shown.starts]


def weights(result, name):
    return load_file(Path(result["artifacts"][name], "model.safetensors"))


def same_weights(one, other):
    """Up to what Adam makes of rounding where gradients are next to nothing."""
    return all(np.allclose(one[n], other[n], rtol=1e-3, atol=1e-3) for n in one)


@pytest.fixture(scope="module")
def alone(ray_cluster, world, tmp_path_factory):
    """One worker; nothing happens to it. The store, what it said, and the result."""
    store, shown = tmp_path_factory.mktemp("alone") / "store", Killer()
    train = {"model": MODEL, "controls": ["rho_down"], "seeds": [0, 1], **LEARNING}
    return store, shown, select(world, store, 1, shown, train=train)


def test_every_model_is_trained_once_from_the_beginning(alone):
    store, shown, result = alone
    labels = ["prior", "conditional", "down"]
    labels += [f"{rule}, seed {seed}" for seed in (0, 1) for rule in ("color", "rho_down")]
    assert starts_of(shown) == [(label, 0, 1) for label in labels]
    assert result["training"]["prior"]["num_steps"] == STEPS
    assert set(result["target"]) == {"color", "rho_down"}
    names = os.listdir(store / "checkpoints")  # only when each training began
    assert {entry for name in names for entry in os.listdir(store / "checkpoints" / name)} == {
        "starts"
    }


@pytest.mark.parametrize("trainers", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_killed_prior_on_more_workers_has_the_same_weights(alone, world, tmp_path, trainers):
    """It goes on from a checkpoint in new processes; targets are trained one a worker."""
    killer = Killer(at=20)
    train = {"model": MODEL, "controls": ["rho_down"], "seeds": [0, 1], **LEARNING}
    found = select(world, tmp_path / "store", trainers, killer, train=train)
    prior = [start for start in starts_of(killer) if start[0] == "prior"]
    assert [workers for _, _, workers in prior] == [trainers] * 2
    assert prior[0][1] == 0 and 12 <= prior[1][1] < STEPS
    expected = alone[2]
    for name in ("prior", "conditional"):
        assert same_weights(weights(expected, name), weights(found, name))
        losses = [made["training"][name]["final_loss"] for made in (expected, found)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    targets = {label: count for label, _, count in starts_of(killer) if "seed" in label}
    assert targets == dict.fromkeys(targets, 1) and len(targets) == 4
    assert found["selection"]["num_sequences"] == expected["selection"]["num_sequences"]
    for rule, losses in expected["target"].items():
        assert found["target"][rule]["heldout_nll"] == pytest.approx(
            losses["heldout_nll"], rel=1e-2
        )


def test_scores_of_two_priors_of_one_name_never_mix(alone, world, tmp_path):
    """The prior is lost and trained again by two workers, whose sums round otherwise: all that
    depends on it is made again, though its name is the same.
    """
    store = tmp_path / "store"
    shutil.copytree(alone[0], store)
    first = select(world, store, 1)
    folder = Path(first["artifacts"]["prior"])
    shutil.rmtree(folder)
    second = select(world, store, 2, selection={"tau": 9})
    assert Path(second["artifacts"]["prior"]).name == folder.name
    assert second["work"]["train prior"]["reused"] == 0
    before, after = weights(alone[2], "prior"), weights(second, "prior")
    assert same_weights(before, after)
    assert not all((before[n] == after[n]).all() for n in before)
    assert second["work"]["train conditional"]["reused"] == 0
    for name in ("prior", "conditional"):
        assert first["artifacts"]["scores"][name] != second["artifacts"]["scores"][name]
        assert second["work"][f"score {name}"]["reused"] == 0


def test_what_the_prior_saw_is_in_its_folder(alone):
    """Sequences of the pool's parts; and the raw documents that lie in them, by file and row."""
    store, _, result = alone
    folder = Path(result["artifacts"]["prior"])
    table = read_table(str(folder / "trained_on.parquet")).to_pylist()
    pool = Store(str(store)).get_manifest("tokens", Path(result["artifacts"]["tokens"]).name)
    files = [
        [f["sha256"] for f in u["files"]] for u in pool.inputs["units"] for _ in range(u["parts"])
    ]
    index = {part.sha256: i for i, part in enumerate(pool.parts)}
    wanted = set()
    for row in table:
        part = index[row["part"]]
        pieces = read_table(f"{store}/{pool.parts[part].path}")["documents"][row["row"]].as_py()
        wanted |= {(files[part][piece["file"]], piece["row"]) for piece in pieces}
    found = {
        (row["file"], document)
        for row in read_table(str(folder / "documents.parquet")).to_pylist()
        for document in range(row["first"], row["last"])
    }
    assert len(table) == 12_000 // 32 and found == wanted
