"""Objectives whose teachers run in the training workers, in the trainer: one process and two."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from training_parts import VOCAB, check_resumed, make_trainer, steps, write_parts

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings
from stillhouse.training.group import WorkerGroup
from stillhouse.training.objectives import cross_entropy as cross_entropy_module
from stillhouse.training.objectives import make_objective
from stillhouse.training.spec import ObjectiveSettings

NUM = 6
SLICES = {"hidden": [16, 32], "mlp_ratios": [2.0, 4.0], "relation_heads": 4}
CASES = {
    "self": {"name": "self_distillation", "weight": 0.3},
    "states": {"name": "distiller", "layers": "cos", "mapping": "last", "hard_weight": 0.5},
    "normalised": {"name": "distiller", "logits": "ce", "layers": "pkd", "temperature": 2.0},
    "critics": {"name": "distiller", "layers": "mi", "group_rows": 4, "mixup": True},
    "transport": {
        "name": "distiller",
        "mapping": "emd",
        "layer_weights": "learned",
        "group_rows": 2,
    },
    "two heads": {"name": "dhkd", "alpha": 0.1},
    "aligned": {"name": "dhkd", "alpha": 0.1, "align": True},
    "sliced": {"name": "autodistil", "relations": "kl", "hard_weight": 0.1, **SLICES},
}


def teacher_of(name):
    """A wider one where widths may differ."""
    width = {"self": 32, "normalised": 32}.get(name, 48)
    settings = ModelSettings(hidden_size=width, num_layers=2)
    return build_model(settings, vocab_size=VOCAB, sequence_length=12, seed=9, eos_id=0)


def trainer(name, uris, group=None, **options):
    settings = ObjectiveSettings.model_validate({**CASES[name], "teachers": [{"path": "given"}]})
    objective = partial(make_objective, settings, None)
    teachers = [teacher_of(name)]
    return make_trainer(uris, group, objective=objective, teachers=teachers, **options)


def worker(rank, folder, uris):
    """One of two processes: the losses and gradient norms of all cases."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: steps(trainer(name, uris, WorkerGroup.current()), NUM) for name in CASES}
    for name in ("self", "states", "critics", "transport"):
        group = WorkerGroup.current(sharded=True)
        found[f"{name} sharded"] = steps(trainer(name, uris, group, micro_batch=4), NUM)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parts, and what two processes found."""
    folder = tmp_path_factory.mktemp("teachers")
    uris = write_parts(folder)
    torch.multiprocessing.spawn(worker, (str(folder), uris), nprocs=2)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    return uris, found[0]


@pytest.mark.parametrize("name", [*CASES])
def test_workers_and_micro_batches_change_no_losses(world, name):
    uris, found = world
    alone = steps(trainer(name, uris), NUM)
    split = steps(trainer(name, uris, micro_batch=4), NUM)
    others = [split, *(found[key] for key in (name, f"{name} sharded") if key in found)]
    for other in others:
        assert [x[0] for x in other] == pytest.approx([x[0] for x in alone], rel=1e-5)
        assert [x[1] for x in other] == pytest.approx([x[1] for x in alone], rel=1e-3)
    assert alone[-1][0] != alone[0][0]


def one_of_four(rank, folder, uris):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/four", rank=rank, world_size=4)
    group = WorkerGroup.current()
    found = {name: steps(trainer(name, uris, group, batch=16, lanes=4), 3) for name in CASES}
    Path(folder, f"four-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.soak
def test_four_workers_change_no_losses(world, tmp_path):
    uris, _ = world
    torch.multiprocessing.spawn(one_of_four, (str(tmp_path), uris), nprocs=4)
    found = json.loads((tmp_path / "four-3.json").read_text())
    for name in CASES:
        alone = steps(trainer(name, uris, batch=16, lanes=4), 3)
        assert [x[0] for x in found[name]] == pytest.approx([x[0] for x in alone], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "aligned"])
def test_compiled_layers_change_no_losses(world, name, monkeypatch):
    """Traced as for a GPU, of the student and of the teacher."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cross_entropy_module._compiled_losses.cache_clear()
    alone, compiled = trainer(name, world[0]), trainer(name, world[0], compile="on")
    for one, other in zip(steps(alone, 3), steps(compiled, 3), strict=True):
        assert other == pytest.approx(one, rel=1e-3)
    cross_entropy_module._compiled_losses.cache_clear()


@pytest.mark.parametrize("name", [*CASES])
def test_resumed_it_has_the_same_bits(world, name):
    check_resumed(lambda: trainer(name, world[0]))


@pytest.mark.parametrize("name", [*CASES])
def test_teachers_are_left_alone(world, name):
    run = trainer(name, world[0])
    [teacher] = run._objective._facts.models
    before = [parameter.clone() for parameter in teacher.parameters()]
    steps(run, 2)
    assert not any(module.training for module in teacher.modules())
    for parameter, value in zip(teacher.parameters(), before, strict=True):
        assert not parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, value)
    kept = {id(parameter) for parameter in run._learner.parameters()}
    assert kept.isdisjoint(map(id, teacher.parameters()))


def test_held_out_sequences_have_the_plain_loss(world):
    ids = torch.randint(0, VOCAB, (5, 6), generator=torch.Generator().manual_seed(0))
    for name in CASES:
        run = trainer(name, world[0])
        with torch.no_grad():
            logits = run._model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        found = torch.from_numpy(run.token_nll(ids.numpy()))
        torch.testing.assert_close(found, losses.view(5, -1))


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("self", {}, "has states of width 48, the model 32"),
        ("states", {"layers": "l2"}, "layers: l2`: use one of mse, cos"),
        ("states", {"group_rows": 1}, "group_rows: 1`: use 2 or more"),
        ("states", {"alpha": 1.5}, "alpha: 1.5`: use between 0 and 1"),
        ("states", {"wieght": 1}, "unexpected keyword argument 'wieght'"),
        ("critics", {"group_rows": 8}, "compares 8 consecutive sequences"),
        ("two heads", {"alpha": -1}, "alpha: -1` has to be 0 or above"),
        ("aligned", {}, "set `train.compile: off`"),
        ("sliced", {"hidden": [16]}, "is not the model"),
        ("sliced", {"hidden": [32]}, "only 2 sub-networks"),
        ("sliced", {"hidden": [32, 64]}, "is larger than the super-network"),
        ("sliced", {"relation_heads": 64}, "have 32 columns"),
    ],
)
def test_what_is_refused(world, name, changes, wanted):
    content = CASES[name] | changes | {"teachers": [{"path": "given"}]}
    objective = partial(make_objective, ObjectiveSettings.model_validate(content), None)

    def start():
        options = {"objective": objective, "teachers": [teacher_of("wide")], "micro_batch": 1}
        options |= {"compile": "on"} if name == "aligned" else {}
        make_trainer(world[0], **options).step()

    with pytest.raises(SpecError, match=wanted):
        start()
