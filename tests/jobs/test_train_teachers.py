"""`job: train` with a teacher in the training workers, and recipes of several trainings."""

import json
from pathlib import Path

import pytest
from small import LEARNING, MODEL, Quiet, make_models, make_world, rows, write
from transformers import AutoModelForCausalLM
from workers import ALONE, Killer

from stillhouse.errors import ModelError, SpecError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.training.spec import TrainSpec

LENGTH, STEPS = 32, 10
CRITICS = {"name": "distiller", "layers": "mi", "group_rows": 2, "mixup": True, "hard_weight": 1.0}
OWN = '''
from stillhouse.training.objectives.self_distillation import SelfDistillation


class Near(SelfDistillation):
    """A class of the user's."""
'''


def spec(folder, **changes):
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": {"path": str(folder / "pool" / "*.parquet")},
        "sequence_length": LENGTH,
        "part_tokens": 4096,
    }
    if "init" not in changes:
        content["model"] = {"hidden_size": 16, "num_layers": 1}
    return TrainSpec.model_validate(content | changes)


def learning(**objective):
    settings = {"num_tokens": LENGTH * 8 * STEPS, "dtype": "float32", **LEARNING}
    return settings | ({"objective": objective} if objective else {})


def train(folder, **changes):
    return run_job(spec(folder, **changes), Quiet())


def losses(result):
    manifest = json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())
    return [point["loss"] for point in manifest["totals"]["points"]]


@pytest.fixture(scope="module")
def world(ray_cluster, tmp_path_factory):
    """A pool of two shards, a tokenizer and untrained models."""
    folder = make_world(tmp_path_factory.mktemp("teachers"), shards=2, per_shard=60)
    return folder, make_models(folder / "models")


def test_a_teacher_runs_in_the_workers(world):
    """On two workers as on one; what the objective learns is no part of the model."""
    folder, models = world
    options = {"tokenizer": models["tokenizer"]}
    objective = CRITICS | {"teachers": [models["prior"]]}
    listener = Quiet()
    alone = run_job(spec(folder, **options, train=learning(**objective)), listener)
    assert "teacher signals" not in {name for name, *_ in listener.steps}
    vocabulary, tokens = 320, LENGTH * 8 * STEPS  # 300 tokens, in whole tiles
    student, teacher = (
        2 * (4 * h**2 + 3 * h * mlp + vocabulary * h) + 2 * LENGTH * h
        for h, mlp in ((16, 64), (32, 128))
    )
    assert alone["cost"]["flops"]["train"] == (3 * student + teacher) * tokens
    both = train(
        folder,
        **options,
        store=str(folder / "other"),
        train=learning(**objective),
        compute={"trainers": 2},
    )
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(alone["artifacts"]["model"])
    assert model.config.hidden_size == 16
    again = train(folder, **options, train=learning(**objective))
    assert again["artifacts"]["model"] == alone["artifacts"]["model"]
    other = train(
        folder, **options, train=learning(**objective | {"teachers": [models["conditional"]]})
    )
    assert other["artifacts"]["model"] != alone["artifacts"]["model"]


@pytest.mark.soak
def test_a_killed_worker_changes_no_byte(world):
    """What the objective learns, and mixup's draws, go on where they were."""
    folder, models = world
    objective = CRITICS | {"teachers": [models["prior"]]}
    settings = learning(**objective) | {"num_tokens": LENGTH * 8 * 300, "checkpoint_every": 20}
    options = {"tokenizer": models["tokenizer"], "train": settings}
    killer, made = Killer(60, ALONE), []
    for name, listener in (("killed", killer), ("unharmed", Quiet())):
        found = run_job(spec(folder, **options, store=str(folder / name)), listener)
        made.append(Path(found["artifacts"]["model"], "model.safetensors").read_bytes())
    assert len(killer.killed) == 1
    first, second = (start["step"] for start in killer.starts)
    assert first == 0 and second >= 40
    assert made[0] == made[1]


def test_a_plan_has_no_signals(world):
    folder, models = world
    objective = CRITICS | {"teachers": [models["prior"]], "alpha": 0.5}
    planned = plan_job(spec(folder, tokenizer=models["tokenizer"], train=learning(**objective)))
    assert "teacher signals" not in planned["steps"]


def test_further_training_with_itself_as_the_teacher(world):
    folder, models = world
    start = {"init": models["prior"], "tokenizer": models["tokenizer"]}
    further = train(folder, **start, train=learning())
    objective = {"name": "self_distillation", "teachers": [{"from": further["run"]}]}
    near = train(folder, **start, train=learning(**objective))
    assert losses(near)[0] == pytest.approx(losses(further)[0], rel=1e-6)
    assert losses(near)[-1] != losses(further)[-1]


@pytest.mark.soak
def test_well_read_students(world):
    """Pre-trained, distilled from the teacher alone, fine-tuned."""
    folder, models = world
    write(folder / "task" / "sea.parquet", rows(3, 60, ["sea"], prefix="u"))
    answers = [
        {"prompt": "the ship and", "completion": " ".join(row["text"].split()[:9])}
        for row in rows(4, 150, ["sea"])
    ]
    write(folder / "labelled" / "sea.parquet", answers)
    given = {"tokenizer": models["tokenizer"]}
    taught = {"name": "distil", "teachers": [models["prior"]], "weight": 1.0}

    def then(before, data, **objective):
        options = {
            "data": {"path": str(folder / data / "*.parquet")},
            "train": learning(**objective),
        }
        return train(folder, **given, init={"from": before["run"]}, **options)

    read = train(folder, **given, train=learning())
    distilled = then(read, "task", **taught)
    tuned = then(distilled, "labelled")
    folders = [one["artifacts"]["model"] for one in (read, distilled, tuned)]
    assert len({*folders}) == 3
    assert losses(tuned)[-1] < losses(tuned)[0]


def test_what_is_refused(world, tmp_path):
    folder, models = world
    given, teachers = {"tokenizer": models["tokenizer"]}, [models["prior"]]
    for objective, wanted in (
        ({"top_k": 5}, "`objective.top_k: 5`: the teacher of distiller runs in the training"),
        ({"signals": "live"}, "`objective.signals: live`: the teacher"),
        ({"teachers": []}, "distiller learns from one model, not 0"),
        ({"teachers": teachers * 2}, "distiller learns from one model, not 2"),
        ({"name": "distil", "signals": "none"}, "distil learns from signals"),
    ):
        content = {"name": "distiller", "teachers": teachers} | objective
        with pytest.raises(ValueError, match=wanted):
            spec(folder, **given, train=learning(**content))
    for objective, wanted in (
        ({"layers": "l2"}, "`train.objective.layers: l2`: use one of mse, cos"),
        ({"mapping": "emd", "group_rows": 3}, "compares 3 consecutive sequences"),
    ):
        content = {"name": "distiller", "teachers": teachers} | objective
        with pytest.raises(SpecError, match=wanted):
            train(folder, **given, train=learning(**content))
    other = make_models(tmp_path / "models")["prior"]["path"]
    vocabulary = Path(models["tokenizer"]["path"], "tokenizer.json").read_text()
    changed = json.loads(vocabulary)
    first, second, *_ = changed["model"]["vocab"]
    ids = changed["model"]["vocab"]
    ids[first], ids[second] = ids[second], ids[first]
    Path(other, "tokenizer.json").write_text(json.dumps(changed))
    content = {"name": "distiller", "teachers": [{"path": other}]}
    with pytest.raises(ModelError, match=r"is not the one beside train\.objective\.teachers\.0"):
        train(folder, **given, train=learning(**content))


def test_an_objective_of_ones_own_gets_models(world, tmp_path, monkeypatch):
    folder, models = world
    monkeypatch.chdir(tmp_path)
    Path("near_it.py").write_text(OWN)
    given = {"tokenizer": models["tokenizer"], "model": MODEL}
    content = {"name": "near_it:Near", "teachers": [models["prior"]]}
    with pytest.raises(SpecError, match="set `signals: none`"):
        train(folder, **given, train=learning(**content))
    made = train(folder, **given, train=learning(**content, signals="none"))
    assert len(losses(made)) == STEPS
