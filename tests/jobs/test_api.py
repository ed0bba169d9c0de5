"""Jobs from Python: the same as the command line, with events."""

from collections import defaultdict

import pytest
import yaml
from small import small_spec

import stillhouse


def test_run_is_the_commands_object_and_tells_of_its_steps(ray_cluster, world, untrained, tmp_path):
    spec = small_spec(world, store=str(tmp_path / "store"), **untrained)
    events = []
    result = stillhouse.run(spec, on_event=events.append)
    assert result["status"] == "done"
    assert stillhouse.open_selection(result["run"]).num_rows == result["selection"]["num_sequences"]
    done = defaultdict(float)
    for event in events:
        if event["kind"] == "progress":
            done[event["step"]] += event["done"]
    steps = {event["step"]: event for event in events if event["kind"] == "step"}
    ended = {event["step"] for event in events if event["kind"] == "step done"}
    assert set(steps) == ended and {"scan", "tokens", "score prior", "selection"} <= ended
    assert {s: steps[s]["reused"] + done[s] for s in done} == pytest.approx(
        {s: steps[s]["parts"] for s in done}
    )
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    assert stillhouse.run(path)["status"] == "nothing_to_do"
    assert stillhouse.plan(spec)["status"] == stillhouse.plan(path)["status"] == "nothing_to_do"


@pytest.mark.parametrize("call", [stillhouse.run, stillhouse.plan])
def test_a_bad_spec_raises(call, tmp_path):
    with pytest.raises(stillhouse.StillhouseError, match=r"`job: selekt` is not known"):
        call({"job": "selekt"})
    with pytest.raises(stillhouse.StillhouseError, match=r"no such file"):
        call(tmp_path / "spec.yaml")
