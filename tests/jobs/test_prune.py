"""Pruning a real store: what a finished run needs stays, also while a run is live."""

import os
import shutil
import time
from pathlib import Path

import pytest
from small import Quiet, digests, parse

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.prune import prune_store
from stillhouse.jobs.run import run_job
from stillhouse.storage import numbered
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.run_record import RunRecord

TWO_DAYS_S = 2 * 86400


def age(folder):
    """Make every file look two days old."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - TWO_DAYS_S,) * 2)


def litter(store):
    """A part without a receipt, and what a killed writer leaves: both two days old."""
    part = store / "scores" / "parts" / f"{fingerprint('lost')}.parquet"
    temporary = part.with_name(f"{part.name}.{'0' * 32}.tmp")
    for path in (part, temporary):
        path.write_bytes(b"lost")
        os.utime(path, (time.time() - TWO_DAYS_S,) * 2)
    return part, temporary


@pytest.fixture
def store(finished, tmp_path):
    """A copy of the finished job's store in which everything is two days old."""
    shutil.copytree(Path(finished["run"]).parents[1], tmp_path / "store")
    age(tmp_path / "store")
    return tmp_path / "store"


def names(store, kind):
    return {path.parent.name for path in (store / kind).rglob("manifest.json")}


def test_a_finished_run_stays_whole(store, finished, reports):
    litter(store)
    before = digests(store)
    code, found = reports("prune", str(store))
    assert (code, found["dry"], found["removed"]) == (0, True, {})
    assert found["unreachable"]["scores"]["objects"] == 2
    assert digests(store) == before
    run = store / "runs" / Path(finished["run"]).name
    reusable = ("runs", "scans", "drops", "tokens/parts", "scores/parts")
    before, tokens = digests(store, *reusable), names(store, "tokens")
    code, found = reports("prune", str(store), "--yes")
    assert (code, found["live_runs"]) == (0, [])
    assert found["removed"] == found["unreachable"]
    assert finished["selection_fingerprint"] in names(store, "selections")
    after = digests(store, *reusable)
    assert {p: d for p, d in before.items() if "lost" not in p and p in after} == after
    assert names(store, "tokens") == tokens
    code, checked = reports("verify", str(run), "--sample", "8")
    assert (code, checked["problems"]) == (0, [])
    assert reports("prune", str(store), "--yes")[1]["objects"] == []


def test_without_its_run_an_artifact_goes_and_a_pin_stays(store, finished, reports):
    shutil.rmtree(store / "runs")
    for path in store.rglob("*"):
        os.utime(path)
    assert reports("prune", str(store), "--yes")[1]["objects"] == []  # nothing young goes
    age(store)
    reports("prune", str(store), "--yes")
    assert names(store, "selections") == names(store, "scores") == set()
    assert {Path(finished["artifacts"][n]).name for n in ("tokenizer", "prior")} <= (
        names(store, "models")
    )


class Pruning(Quiet):
    """Prunes at every event of a run."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        self.live = []

    def begin(self, step, total, reused, unit):
        super().begin(step, total, reused, unit)
        self._prune()

    def end(self, step, seconds):
        super().end(step, seconds)
        self._prune()

    def _prune(self):
        self.live.append(prune_store(str(self.store), grace_hours=1, yes=True)["live_runs"])


def test_a_live_run_keeps_what_it_may_reuse(store, world, given, reports):
    """No finished run names what it finds there, all of it is old, and pruning never rests."""
    spec = parse(world, store=str(store), **given)
    run_job(spec, Quiet())
    shutil.rmtree(store / "runs")
    age(store)
    part, temporary = litter(store)
    listener = Pruning(store)
    result = run_job(spec, listener)
    assert listener.live == [[Path(result["run"]).name]] * len(listener.live) != []
    assert all(work["parts"] == work["reused"] for work in result["work"].values())
    assert reports("verify", result["run"], "--sample", "8")[0] == 0
    assert part.exists() and not temporary.exists()
    prune_store(str(store), grace_hours=1, yes=True)
    assert not part.exists()
    assert reports("verify", result["run"], "--sample", "8")[0] == 0


def test_checkpoints_go_when_their_training_is_over(tmp_path, reports):
    """A finished training's are removed; while a run is live none is."""
    with pytest.raises(ArtifactError, match="is not a store"):
        prune_store(str(tmp_path), grace_hours=24, yes=False)
    store = Store(check_store(str(tmp_path / "store")))
    model, checkpoints = fingerprint("model"), fingerprint("its checkpoints")
    for kind, name in (("models", model), ("checkpoints", f"{checkpoints}/00000010")):
        store.put_manifest(Manifest(kind, name, (), {}, {}))
    numbered.append(store.path("checkpoints", checkpoints, "starts"), {"step": 0})
    record = RunRecord(store, fingerprint("run"))
    record.start("job: train", "train")
    record.put_result({"job": "train", "model_fingerprint": model})
    age(store.uri)
    (row,) = [r for r in reports("status", store.uri)[1]["artifacts"] if r["kind"] != "models"]
    assert (row["kind"], row["fingerprint"], row["referred_by"]) == ("checkpoints", checkpoints, [])
    record.flush()
    assert prune_store(store.uri, grace_hours=24, yes=True)["objects"] == []
    record.finish("done")
    gone = prune_store(store.uri, grace_hours=24, yes=True)["objects"]
    assert gone == [
        f"checkpoints/{checkpoints}/00000010/manifest.json",
        f"checkpoints/{checkpoints}/starts/00000001.json",
    ]
    assert names(Path(store.uri), "models") == {model}
