"""What a plan says, and that it leaves no trace."""

import pytest
from small import LEARNING, MODEL, digests, parse, small_spec

from stillhouse.jobs.plan import plan_job

ALL = {"model": MODEL, "controls": ["random", "conditional_only", "dsir"], **LEARNING}


def test_of_a_store_that_does_not_exist(world, tmp_path):
    planned = plan_job(parse(world, store=str(tmp_path / "new"), train=ALL))
    assert planned["status"] == "to_do"
    steps = planned["steps"]
    assert steps["scan"] == steps["scan"] | {"parts": 5, "reused": 0}
    assert {"train prior", "score prior", "score conditional", "selection", "train targets"} <= set(
        steps
    )
    assert steps["train prior"]["flops"] > 0
    assert steps["score prior"]["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_of_a_finished_job(world, finished):
    before = digests(world / "store")
    planned = plan_job(parse(world, train=ALL))
    assert planned["status"] == "nothing_to_do"
    assert planned["run"] == finished["run"]
    assert all(step["parts"] == step["reused"] for step in planned["steps"].values())
    assert not any(step["seconds"] for step in planned["steps"].values())
    assert digests(world / "store") == before


@pytest.mark.parametrize("shares", [{}, {"max_share": 0.5}])
def test_of_another_tau(world, finished, shares):
    before = digests(world / "store")
    planned = plan_job(parse(world, train=ALL, selection={"tau": 11, **shares}))
    steps = planned["steps"]
    for step in ("tokens", "train prior", "train conditional", "score prior", "score conditional"):
        assert steps[step]["parts"] == steps[step]["reused"] > 0
        assert steps[step]["seconds"] == 0
    assert steps["train targets"]["seconds"] > 0
    assert steps["selection"]["reused"] == 0
    assert digests(world / "store") == before


def test_of_models_that_are_given(world, finished, given, tmp_path):
    """The digests of the models' files are not remembered either."""
    before = digests(world / "store")
    planned = plan_job(parse(world, **given))
    assert "train prior" not in planned["steps"]
    assert planned["steps"]["score prior"]["reused"] == 0
    assert digests(world / "store") == before


def test_command_line(world, finished, reports, tmp_path):
    import yaml

    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(world, train=ALL)))
    code, planned = reports("plan", str(path))
    assert (code, planned["status"]) == (0, "nothing_to_do")
    assert planned["notes"] == ["nothing to do: this spec and these inputs have a finished run"]
