"""Sweeps over `train.objective.*` on three tasks, and what they recommend for a fourth."""

import json
from statistics import fmean

import pytest
from small import LEARNING, Quiet, rows, write
from typer.testing import CliRunner

from stillhouse.errors import StepFailedError
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.cli import app
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec

KINDS = {"sea": ["sea"], "law": ["law"], "both": ["sea", "law"]}
GRID = {"train.objective.layers": ["mse", "cos"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    for seed, (name, kinds) in enumerate(KINDS.items()):
        write(folder / f"{name}.parquet", rows(2 * seed, 60, kinds))
        write(folder / f"{name}-heldout.parquet", rows(2 * seed + 1, 20, kinds))
    return folder


def content_of(folder, untrained, name, **objective):
    teacher = {"path": untrained["prior"]["path"]}
    distiller = {"name": "distiller", "teachers": [teacher], "hard_weight": 1.0}
    return {
        "job": "train",
        "store": str(folder / "store"),
        "name": name,
        "data": {"path": str(folder / f"{name}.parquet")},
        "heldout": {"path": str(folder / f"{name}-heldout.parquet")},
        "tokenizer": untrained["tokenizer"],
        "sequence_length": 32,
        "part_tokens": 4096,
        "model": {"hidden_size": 16, "num_layers": 1},
        "train": {
            "num_tokens": 32 * 8 * 10,
            "dtype": "float32",
            "eval_points": 1,
            "objective": distiller | objective,
            **LEARNING,
        },
        "compute": {"trainers": 1, "packers": 1},
    }


def swept(folder, untrained, name, over=GRID):
    sweep = {"over": over, "metric": "train.heldout_nll"}
    return parse_spec(content_of(folder, untrained, name) | {"sweep": sweep}, "spec")


@pytest.fixture(scope="module")
def made(ray_cluster, folder, untrained):
    return {name: run_spec(swept(folder, untrained, name), Quiet()) for name in KINDS}


def test_variants_are_runs_with_that_objective(made, folder, untrained):
    found = made["sea"]["sweep"]["variants"]
    assert [one["status"] for one in found] == ["done", "done"]
    for one, layers in zip(found, ("mse", "cos"), strict=True):
        alone = parse_spec(content_of(folder, untrained, "sea", layers=layers), "spec")
        by_hand = run_job(alone, Quiet())
        assert by_hand["status"] == "nothing_to_do" and by_hand["run"] == one["run"]
        assert by_hand["train"]["heldout_halves"]["validation"] == one["metric"]
    assert found[0]["metric"] != found[1]["metric"]


def test_what_they_recommend(made, folder):
    """With two settings, the regret is 0 or their distance, and the gain is half of it, or less
    than nothing."""
    runs = [one["sweep"]["run"] for one in made.values()]
    called = CliRunner().invoke(app, ["recommend", *runs, "--json"])
    assert called.exit_code == 0, called.stderr
    found = json.loads(called.stdout)
    assert [one["name"] for one in found["tasks"]] == [*KINDS]
    for one, sweep in zip(found["tasks"], made.values(), strict=True):
        metrics = {
            v["values"]["train.objective.layers"]: v["metric"] for v in sweep["sweep"]["variants"]
        }
        chosen = metrics[one["setting"]["train.objective.layers"]]
        assert one["regret"] == pytest.approx(chosen - min(metrics.values()))
        assert one["gain"] == pytest.approx(fmean(metrics.values()) - chosen)
    assert found["recommended"]["train.objective.layers"] in ("mse", "cos")


def test_a_setting_that_the_objective_does_not_know(ray_cluster, folder, untrained):
    spec = swept(folder, untrained, "sea", {"train.objective.layer": ["mse"]})
    with pytest.raises(StepFailedError, match="unexpected keyword argument 'layer'") as failed:
        run_spec(spec, Quiet())
    assert failed.value.exit_code == 2
