"""`job: train` on real Ray: one, two and four workers, a killed worker, shards, the report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from result_keys import check_keys
from samples import order_digest
from small import Quiet, rows, write
from workers import Killer, training_workers

from stillhouse import open_selection
from stillhouse.errors import ArtifactError, SpecError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import run_job
from stillhouse.jobs.status import draw_report
from stillhouse.report.page import read
from stillhouse.storage.run_record import event_files
from stillhouse.text.packing import tokens_schema
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.schedule import Schedule
from stillhouse.training.spec import TrainSpec

STEPS, LENGTH = 160, 32
DOCUMENTS = tokens_schema(LENGTH, np.uint16).field("documents").type


def write_tokens(path, seed, count, sources):
    """Counting sequences, each of one source, which its first token shows."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(count) % len(sources)
    ids = (rng.integers(5, 60, (count, 1)) * (kinds[:, None] + 1) + np.arange(LENGTH)) % 250
    documents = [
        [{"id": "a", "source": sources[k], "start": 0, "end": LENGTH, "file": 0, "row": row}]
        for row, k in enumerate(kinds)
    ]
    flat = pa.array(ids.astype(np.uint16).reshape(-1))
    columns = [pa.FixedSizeListArray.from_arrays(flat, LENGTH), pa.array(documents, DOCUMENTS)]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns, ["input_ids", "documents"]), path, row_group_size=50)


@pytest.fixture(scope="module")
def place(tmp_path_factory, untrained):
    folder = tmp_path_factory.mktemp("train")
    for name, count, sources in (
        ("a/0", 120, ["sea", "code"]),
        ("a/1", 80, ["sea", "law"]),
        ("b/0", 100, ["food"]),
        ("heldout/0", 24, ["sea"]),
    ):
        write_tokens(folder / f"{name}.parquet", count, count, sources)
    return folder, untrained["tokenizer"]


def parse(place, store, trainers, changes=None, **learning):
    """Tokens in two data sets, 2:1, and a held-out; 160 steps of 8 sequences of 32."""
    folder, tokenizer = place
    settings = {"num_tokens": STEPS * 8 * LENGTH, "global_batch": 8, "learning_rate": 3e-3}
    settings |= {"window": 10, "eval_points": 4, "checkpoint_every": 40, "dtype": "float32"}
    return TrainSpec.model_validate(
        {
            "job": "train",
            "name": "small",
            "store": str(folder / store),
            "data": [{"path": str(folder / "a"), "weight": 2}, {"path": str(folder / "b")}],
            "tokenizer": tokenizer,
            "model": {"hidden_size": 32, "num_layers": 1},
            "heldout": {"path": str(folder / "heldout")},
            "train": settings | learning,
            "compute": {"trainers": trainers, "packers": 1},
        }
        | (changes or {})
    )


def model_of(result):
    return json.loads(Path(result["artifacts"]["model"], "manifest.json").read_text())


def losses(result):
    return [point["loss"] for point in model_of(result)["totals"]["points"]]


@pytest.fixture(scope="module")
def trained(ray_cluster, place):
    """Two workers, nothing happens to them."""
    return run_job(parse(place, "two", 2), Quiet())


def test_the_result_is_the_contract(trained, place):
    found = trained["train"]
    assert (trained["status"], trained["job"]) == ("done", "train")
    check_keys(trained)
    assert found["num_tokens"] == STEPS * 8 * 32 and found["num_steps"] == STEPS
    assert found["heldout_nll"] < 5 and found["restarts"] == 0
    sets = [Rows((120, 80), 2), Rows((100,), 1)]
    order = SampleOrder(sets, global_batch=8, seed=0, lanes=8, window=10)
    assert found["order_sha256"] == order_digest(order, STEPS)  # in this process, one by one
    assert found["tokens_per_second"] > 0 and 0 <= found["data_wait_share"] < 1
    assert set(found["sources"]) == {"sea"}
    manifest = model_of(trained)
    assert set(manifest["totals"]["evaluations"][-1]["trained"]) == {"sea", "code", "law", "food"}
    assert manifest["inputs"]["data"]["sets"][0]["weight"] == 2
    assert manifest["settings"]["train"]["learning_rate"] == 3e-3
    json.dumps(trained, allow_nan=False)
    spec = parse(place, "two", 2)
    again = run_job(spec, Quiet())
    assert (again["status"], again["train"]) == ("nothing_to_do", found)
    assert plan_job(spec)["status"] == "nothing_to_do"


def test_the_report_shows_it(trained):
    report = read(trained["run"])
    curve = report.find("learning", "curves")[0].curves["held out"][0]
    assert curve[-1][1] == trained["train"]["heldout_nll"]
    (data,) = report.find("data", "table")
    assert [(row[0], round(row[1], 3)) for row in data.rows] == [("a", 0.667), ("b", 0.333)]
    page = Path(draw_report(trained["run"])).read_text()
    assert page.startswith("<!doctype html>") and "held-out" in page and "sea" in page
    events = [
        json.loads(line)["event"]
        for name in event_files(trained["run"])
        for line in Path(trained["run"], name).read_text().splitlines()
    ]
    assert {"train start", "train point", "train evaluation"} <= set(events)
    with pytest.raises(ArtifactError, match="is a run of `job: train`: it made no selection"):
        open_selection(trained["run"])


def test_a_killed_worker_changes_no_byte(trained, place):
    killer = Killer(at=60)
    killed = run_job(parse(place, "killed", 2), killer)
    assert len(killer.killed) == 1
    assert [start["workers"] for start in killer.starts] == [2, 2]
    assert killer.starts[1]["step"] % 40 == 0 and killed["train"]["restarts"] == 1
    assert killed["train"]["order_sha256"] == trained["train"]["order_sha256"]
    assert model_of(killed)["files"] == model_of(trained)["files"]
    (starts,) = read(killed["run"]).find("speed", "table")
    assert [workers for _, workers in starts.rows] == [2, 2]


def mixed(place, first, second):
    """Changes of a spec: keys of the two data sets."""
    folder = place[0]
    return {"data": [{"path": str(folder / "a")} | first, {"path": str(folder / "b")} | second]}


def sums_of(result):
    return [
        (one["name"], one["asked"], one["drawn"], one["epochs"]) for one in result["train"]["data"]
    ]


def test_weights_that_change_on_two_workers_one_killed_and_on_one(ray_cluster, place):
    """Three to one for 128 of 160 steps, then none of the first."""
    points = [{"at": 0, "weight": 3}, {"at": 0.8, "weight": 0}]
    changes = mixed(place, {"weight": {"schedule": points}}, {"weight": 1})
    killer = Killer(at=60)
    killed = run_job(parse(place, "scheduled", 2, changes), killer)
    assert len(killer.killed) == 1 and killed["train"]["restarts"] == 1
    alone = run_job(parse(place, "scheduled alone", 1, changes), Quiet())
    sets = [Rows((120, 80), Schedule(((0.0, 3.0), (0.8, 0.0)))), Rows((100,))]
    order = SampleOrder(sets, global_batch=8, seed=0, lanes=8, window=10, num_steps=STEPS)
    for found in (killed, alone):
        assert found["train"]["order_sha256"] == order_digest(order, STEPS)
        # 96 of 128 draws of each of 8 lanes are of 200 sequences, 64 of 160 of 100
        assert sums_of(found) == [("a", 0.6, 0.6, 768 / 200), ("b", 0.4, 0.4, 512 / 100)]
    assert losses(alone) == pytest.approx(losses(killed), rel=1e-4)
    assert model_of(alone)["inputs"]["data"]["sets"][0]["weight"] == {
        "points": [[0.0, 3.0], [0.8, 0.0]],
        "linear": False,
    }
    (chart,) = read(killed["run"]).find("data", "curves")
    assert [share for _, share in chart.curves["a"][0]] == [75, 75, 0, 0]


def test_an_exhausted_data_set_is_refused_or_left_out(ray_cluster, place):
    """100 sequences on 8 lanes: 12 in each at least, twice, of 80 that are asked for."""
    with pytest.raises(
        SpecError, match=r"`data\.1\.max_epochs: 2`: 40960 tokens .* see 'b' 6\.\d+"
    ):
        run_job(parse(place, "exhausted", 2, mixed(place, {}, {"max_epochs": 2})), Quiet())
    changes = mixed(place, {}, {"max_epochs": 2, "when_exhausted": "reweight"})
    spec = parse(place, "exhausted", 2, changes)
    found = run_job(spec, Quiet())
    assert sums_of(found) == [("a", 0.5, 0.85, 1088 / 200), ("b", 0.5, 0.15, 192 / 100)]
    # every second draw is one of 24 rows in each lane
    assert [one["exhausted_at"] for one in found["train"]["data"]] == [None, 48]
    assert "<code>b</code> was exhausted at step 48 of 160" in Path(found["report"]).read_text()
    sets = [Rows((120, 80)), Rows((100,), max_epochs=2)]
    order = SampleOrder(sets, global_batch=8, seed=0, lanes=8, window=10, num_steps=STEPS)
    assert found["train"]["order_sha256"] == order_digest(order, STEPS)
    assert plan_job(spec)["status"] == "nothing_to_do"
    with pytest.raises(SpecError, match=r"`data\.1\.max_epochs: 2`"):
        plan_job(parse(place, "exhausted", 2, mixed(place, {}, {"max_epochs": 2})))


@pytest.mark.soak
def test_other_widths_accumulation_and_shards(trained, place):
    for store, trainers, learning in (
        ("one", 1, {}),
        ("four", 4, {}),
        ("micro", 2, {"micro_batch": 1}),
        ("sharded", 2, {"sharding": "fsdp"}),
    ):
        found = run_job(parse(place, store, trainers, **learning), Quiet())
        assert found["train"]["order_sha256"] == trained["train"]["order_sha256"]
        assert losses(found) == pytest.approx(losses(trained), rel=1e-5)
        if store in {"one", "four"}:
            assert found["model_fingerprint"] == trained["model_fingerprint"]


@pytest.mark.soak
def test_documents_are_packed_first(ray_cluster, place, tmp_path):
    write(tmp_path / "pool" / "0.parquet", rows(1, 60, ["sea", "law"]))
    write(tmp_path / "heldout" / "0.parquet", rows(2, 20, ["sea"]))
    changes = {
        "data": {"path": str(tmp_path / "pool")},
        "heldout": {"path": str(tmp_path / "heldout")},
        "sequence_length": 16,
        "part_tokens": 1000,
    }
    found = run_job(parse(place, "text", 1, changes, num_tokens=16 * 8 * 20), Quiet())
    assert found["work"]["tokens"]["parts"] >= 2
    last = model_of(found)["totals"]["evaluations"][-1]
    assert set(last["trained"]) == {"sea", "law"} and set(last["heldout"]) == {"sea"}


@pytest.mark.soak
def test_data_that_are_not_kept_come_through_ray_data(ray_cluster, place):
    """Nine million tokens: windows behind the first ones are read by Ray Data, in the order."""
    folder, length, rows = place[0] / "large", 512, 9000
    folder.mkdir()
    for part in range(2):
        ids = np.random.default_rng(part).integers(5, 250, rows * length).astype(np.uint16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids), length)
        pq.write_table(pa.table({"input_ids": column}), folder / f"{part}.parquet")
    changes = {"data": {"path": str(folder)}, "heldout": None}
    learning = {"num_tokens": 20 * 8 * length, "window": 5}
    found = run_job(parse(place, "large", 2, changes, **learning), Quiet())
    order = SampleOrder([Rows((rows, rows))], global_batch=8, seed=0, lanes=8, window=5)
    assert found["train"]["order_sha256"] == order_digest(order, 20)


@pytest.mark.soak
def test_another_number_of_workers_goes_on(trained, place):
    """Two workers die for good; one goes on from their checkpoint in a new run."""

    class Stop(Quiet):
        def note(self, kind, content):
            if kind == "train point" and content["step"] >= 60:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(parse(place, "changed", 2), Stop())
    found = run_job(parse(place, "changed", 1), Quiet())
    assert found["train"]["order_sha256"] == trained["train"]["order_sha256"]
    assert losses(found) == pytest.approx(losses(trained), rel=1e-4)
    assert found["train"]["restarts"] == 1
    assert [row["workers"] for row in model_of(found)["totals"]["measured"]["starts"]] == [2, 1]


def test_every_file_of_the_model_is_checked(trained, tmp_path, reports):
    assert reports("verify", trained["run"])[1]["checked"]["objects"] >= 4
    folder = tmp_path / "store" / "models" / trained["model_fingerprint"]
    shutil.copytree(trained["artifacts"]["model"], folder)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    code, found = reports("verify", str(folder))
    missing, changed = found["problems"]
    assert code == 3
    assert missing.startswith(f"{folder}/tokenizer.json is missing, ")
    assert changed.startswith(f"{folder}/config.json has sha256 44136fa355b3, ")  # of `{}`
    assert training_workers() == []
