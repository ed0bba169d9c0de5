"""Publishing what runs made, in stores whose finished runs are put there by hand: no Ray."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from small import Quiet, parse, write_shard

from stillhouse import open_selection
from stillhouse.errors import ArtifactError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.prune import prune_store
from stillhouse.jobs.publish import owner
from stillhouse.jobs.run import list_job, run_job, run_name
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.run_record import RunRecord


def put_selection(store, word):
    """An empty selection; its fingerprint."""
    name = fingerprint(["selections", word])
    store.put_manifest(Manifest("selections", name, (), {"made of": word}, {}))
    return name


def finish(spec, word):
    """Leave what a finished run of `spec` on today's inputs leaves; the run's URI."""
    store = Store(check_store(spec.store))
    name = run_name(spec, list_job(spec).open(store, remember=True).identity())
    record = RunRecord(store, name)
    record.start(spec.to_yaml(), spec.job)
    made = {"job": "select", "run": record.uri, "work": {}}
    made["selection_fingerprint"] = put_selection(store, word)
    record.put_result(made)
    record.finish("done")
    return record.uri


def publish(spec):
    """What a run of a spec that is finished says of its name."""
    return run_job(spec, Quiet())["published"]


@pytest.fixture
def place(world, tmp_path):
    """A copy of the small world with a store of its own."""
    for name in ("pool", "target"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def two(place):
    """The spec of two nights, of which the second had a new shard, both published."""
    spec = parse(place, publish="books")
    for word in ("first", "second"):
        write_shard(place, 9, per_shard=8 * len(word))
        finish(spec, word)
        publish(spec)
    return spec


def content(uri):
    return open_selection(uri).manifest.inputs["made of"]


def test_runs_publish_what_is_new(place):
    spec = parse(place, publish="books-daily")
    finish(spec, "first")
    first = run_job(spec, Quiet())
    assert (first["status"], first["published"]["version"]) == ("nothing_to_do", 1)
    assert first["published"]["new"] is True
    assert publish(spec)["new"] is False
    write_shard(place, 9, per_shard=8)
    finish(spec, "second")
    assert publish(spec) == {
        "name": "books-daily",
        "version": 2,
        "selection": f"{place}/store/selections/{fingerprint(['selections', 'second'])}",
        "again": None,
        "new": True,
    }
    assert content(f"{place}/store#books-daily") == "second"


def test_a_name_in_use_is_refused_before_any_work(place):
    finish(parse(place), "first")
    publish(parse(place, publish="books"))
    before = sorted((place / "store" / "runs").iterdir())
    with pytest.raises(SpecError, match=r"`selection.tau`: 8.0 there, 16.0 here"):
        publish(parse(place, publish="books", selection={"tau": 16}))
    assert sorted((place / "store" / "runs").iterdir()) == before
    with pytest.raises(ValueError, match="publish"):
        parse(place, publish="Books!")


def test_publish_is_no_part_of_the_job(place):
    """The same run serves specs with and without a name; widths and stores do not own one."""
    finish(parse(place), "first")
    assert "published" not in run_job(parse(place), Quiet())
    assert publish(parse(place, publish="a"))["version"] == 1
    wide = parse(place, publish="b", compute={"scorers": 9}, store="elsewhere", name="x")
    assert owner(wide) == owner(parse(place))


def test_by_hand_back_and_forward(two, reports):
    store = two.store
    code, found = reports("publish", "books", "--to", "1", "--store", store)
    assert (code, found["version"], found["again"], found["new"]) == (0, 3, 1, True)
    assert content(f"{store}#books") == "first"
    assert publish(two)["new"] is False
    code, found = reports("publish", f"{store}#books")
    assert (code, found["version"], found["again"]) == (0, 4, None)
    assert content(f"{store}#books") == "second"
    code, shown = reports("status", f"{store}#books")
    versions = [(v["version"], v["again"]) for v in shown["versions"]]
    assert (code, versions) == (0, [(1, None), (2, None), (3, 1), (4, None)])
    assert all(version["published"].endswith("+00:00") for version in shown["versions"])
    assert reports("status", store)[1]["names"] == [
        {"name": "books", "versions": shown["versions"]}
    ]


def test_by_hand_a_run_or_any_selection_of_the_store(place, reports):
    finish(parse(place), "first")
    publish(parse(place, publish="books"))
    run = finish(parse(place, selection={"tau": 16}), "other tau")
    store = Store(check_store(str(place / "store")))
    assert reports("publish", "books", "--to", run, "--store", store.uri)[1]["version"] == 2
    # the run's spec owns the name now
    assert publish(parse(place, publish="books", selection={"tau": 16}))["new"] is False
    code, found = reports("publish", "books", "--to", run, "--store", store.uri)
    assert (code, found["new"]) == (0, False)
    name = put_selection(store, "mine")
    found = reports("publish", "mine", "--to", name[:10], "--store", store.uri)[1]
    assert found["selection"] == store.path("selections", name)
    assert content(f"{store.uri}#mine") == "mine"
    other = Store(check_store(str(place / "other")))
    away = other.path("selections", put_selection(other, "x"))
    code, found = reports("publish", "mine", "--to", away, "--store", store.uri)
    assert (code, "a name refers to its own store" in found["error"]) == (3, True)


def test_a_name_may_stand_for_a_model(tmp_path, reports):
    store = Store(check_store(str(tmp_path / "store")))

    def to(version):
        return reports("publish", "model", "--to", version, "--store", store.uri)

    for word in ("first", "second"):
        store.put_manifest(Manifest("models", fingerprint(word), (), {}, {}))
        uri = store.path("models", fingerprint(word))
        code, found = to(uri)
        assert code == 3 and "is no trained model (no config.json)" in found["error"]
        Path(uri, "config.json").write_bytes(b"{}")
        found = to(uri)[1]
        assert (found["model"], found["new"]) == (uri, True)
    code, found = to("1")
    assert (code, found["model"]) == (0, store.path("models", fingerprint("first")))
    with pytest.raises(ArtifactError, match="stands for one of `models`, not a selection"):
        open_selection(f"{store.uri}#model")
    for kind, message in (
        ("tokens", "is one of `tokens`: a name stands for"),
        ("distilled", "'model' stands for one of `models`"),
    ):
        store.put_manifest(Manifest(kind, fingerprint(kind), (), {}, {}))
        code, found = to(store.path(kind, fingerprint(kind)))
        assert (code, message in found["error"]) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["books"], 3, "is not a store: it holds no store.json (give `--store`)"),
        (["Books!"], 2, "invalid name 'Books!': use up to 63 of"),
        (["made#books"], 3, "nothing is published under 'books'"),
        (["made#books", "--to", "4"], 3, "nothing is published under 'books'"),
        (["made#books", "--to", "runs/x"], 3, "no run"),
    ],
)
def test_what_cannot_be_published(tmp_path, monkeypatch, reports, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    check_store("made")
    found = reports("publish", *arguments)
    assert (found[0], message in found[1]["error"]) == (code, True)


def test_prune_keeps_every_version_of_a_name(two, place):
    store = Store(two.store)
    unnamed = put_selection(store, "unnamed")
    shutil.rmtree(place / "store" / "runs")
    for path in (place / "store").rglob("*"):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    gone = prune_store(store.uri, grace_hours=24, yes=True)["objects"]
    assert gone == [f"selections/about/{unnamed}/manifest.json"]
    assert content(f"{store.uri}#books") == "second"
    first = json.loads((place / "store" / "names" / "books" / "00000001.json").read_text())
    assert open_selection(store.path("selections", first["selection"])).num_rows == 0


def test_what_changes_nothing_of_a_selection_is_no_other_owner(place):
    """Target models, speed and a take-down; what decides the selection is another spec."""
    (place / "ids.txt").write_text("d1")
    train = {"model": {"hidden_size": 32, "num_layers": 1}}
    others = [
        {"train": train},
        {"train": train | {"controls": ["random"]}},
        {},
        {"train": train, "scoring": {"micro_batch": 4, "compile": "off"}},
        {"exclude": {"ids": str(place / "ids.txt")}},
    ]
    for number, changes in enumerate(others):
        spec = parse(place, publish="books", **changes)
        finish(spec, f"of {number}")
        assert publish(spec)["version"] == 1 + number
    for changes in ({"selection": {"tau": 9}}, {"scoring": {"dtype": "float32"}}):
        with pytest.raises(SpecError, match="in use by another spec"):
            publish(parse(place, publish="books", **changes))
