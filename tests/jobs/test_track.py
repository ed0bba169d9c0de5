"""`track`: real trackers are told what a job measured; one that is down costs a warning."""

import json
import struct
from pathlib import Path

import pytest
from mlflow import MlflowClient
from small import Quiet
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

import stillhouse.report.blocks as b
from stillhouse.errors import MissingExtraError
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.track import Tracked, numbers_in
from stillhouse.pipelines.context import Listener
from stillhouse.report.page import write
from stillhouse.storage.artifact import Store

POINTS = [{"training": "target", "step": s, "loss": 3.0 - s, "tokens": 10 * s} for s in (1, 2)]
RESULT = {"job": "train", "run": "r", "status": "done", "cost": {"flops": {"train": 5.0}}}
TAGS = {
    "target/point/loss": [(1, 2.0), (2, 1.0)],
    "target/point/tokens": [(1, 10.0), (2, 20.0)],
    "target/evaluation/sources/sea": [(2, 0.5)],
    "result/cost/flops/train": [(0, 5.0)],
}


class Noted(Listener):
    def __init__(self):
        self.notes = []

    def note(self, kind, content):
        self.notes.append((kind, content))


def spec(**track):
    content = {"job": "train", "name": "nightly", "store": "s", "data": {"path": "p"}}
    content |= {"tokenizer": {"train": {}}, "model": {}, "track": track}
    return parse_spec(content, "spec.yaml")


def tell(given, points=POINTS, result=RESULT):
    """The events of a small training; what was passed on."""
    shown = Noted()
    tracked = Tracked(shown, given, "train", "0123456789abcdef" * 4)
    for point in points:
        tracked.note("train point", point)
    evaluation = {"training": "target", "step": 2, "sources": {"sea": 0.5, "law": float("nan")}}
    tracked.note("train evaluation", evaluation)
    tracked.note("train start", {"training": "target", "step": 0, "workers": 1})
    tracked.finish(result)
    return shown.notes


def test_tensorboard(tmp_path):
    notes = tell(spec(tensorboard=str(tmp_path)))
    assert [kind for kind, _ in notes] == ["train point"] * 2 + ["train evaluation", "train start"]
    read = EventAccumulator(str(tmp_path / "nightly-0123456789abcdef"))
    read.Reload()
    found = {t: [(e.step, e.value) for e in read.Scalars(t)] for t in read.Tags()["scalars"]}
    assert found == TAGS


def test_mlflow_has_one_run_also_after_a_restart(tmp_path):
    given = spec(mlflow=str(tmp_path / "runs"))
    tell(given, POINTS[:1], None)
    client = MlflowClient(f"file://{tmp_path}/runs")
    number = client.get_experiment_by_name("stillhouse").experiment_id
    [run] = client.search_runs([number])
    assert (run.info.run_name, run.info.status) == ("nightly", "FAILED")
    tell(given, POINTS[1:])
    [run] = client.search_runs([number])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "target/point/loss")
    assert [(m.step, m.value) for m in history] == TAGS["target/point/loss"]
    assert run.data.metrics["result/cost/flops/train"] == 5


def records_of(data):
    """The records of a LevelDB log behind wandb's header of 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(spec(wandb="selection"))
    [file] = Path("wandb").glob("offline-run-*/*.wandb")
    rows = []
    for data in records_of(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        if record.WhichOneof("record_type") == "run":
            about = record.run.project, record.run.display_name, record.run.run_id
    assert about == ("selection", "nightly", "0123456789abcdef")
    for tag, points in TAGS.items():
        assert [(r[f"{tag}/step"], r[tag]) for r in rows if tag in r] == points


def test_a_tracker_that_is_down_costs_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notes = tell(spec(mlflow="http://127.0.0.1:1", tensorboard=str(tmp_path)))
    warned = [content for kind, content in notes if kind == "tracker"]
    assert [one["tracker"] for one in warned] == ["mlflow"]
    assert capsys.readouterr().err.count("warning: track.mlflow: ") == 1
    assert [*tmp_path.rglob("events.out.*")]


def test_numbers_by_path():
    values = {"a": 1, "b": {"c d": 2.5, "x:y": [3]}, "e": True, "f": "3", "g": float("inf")}
    assert numbers_in(values, "") == {"a": 1.0, "b/c d": 2.5}
    assert numbers_in({"a:b%": 1}, "top") == {"top/a_b_": 1.0}


def test_a_tracker_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("stillhouse.errors.find_spec", lambda name: None if name == "wandb" else 1)
    with pytest.raises(MissingExtraError, match=r"pip install 'stillhouse\[wandb\]'"):
        run_job(spec(wandb="project"), Quiet())


def test_the_curves_of_a_report_at_the_end(tmp_path):
    """Of a mixture, whose trainings have no events: each seed's points, by caption and name."""
    curves = b.Curves("Rewards", {"exp3": [[(1, 0.5), (2, 0.25)], [(1, 1.0)]]}, x_title="steps")
    sections = [b.Section("policy", "", [b.Group([curves])])]
    run = Store(str(tmp_path)).path("runs", "0" * 64)
    numbers = {"run": run, "job": "mix", "report": f"{run}/report.html"}
    write(b.Result("mix", "a mixture", "2026-01-01T00:00:00+00:00", numbers, sections))
    tell(spec(tensorboard=str(tmp_path / "board")), [], RESULT | {"job": "mix", "run": run})
    read = EventAccumulator(str(tmp_path / "board" / "nightly-0123456789abcdef"))
    read.Reload()
    found = {tag: [(e.step, e.value) for e in read.Scalars(f"Rewards/exp3/{tag}")] for tag in "01"}
    assert found == {"0": [(1, 0.5), (2, 0.25)], "1": [(1, 1.0)]}
