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
from stillhouse.jobs.kinds import list_job
from stillhouse.jobs.prune import prune_store
from stillhouse.jobs.publish import names_of, owner
from stillhouse.jobs.run import run_job, run_name
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


@pytest.fixture
def place(world, tmp_path):
    """A copy of the small world with a store of its own."""
    for name in ("pool", "target"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def published(place):
    return names_of(str(place / "store"))[0]["versions"]


def test_nightly_runs_publish_what_is_new(place):
    spec = parse(place, publish="books-daily")
    finish(spec, "first")
    first = run_job(spec, Quiet())
    assert (first["status"], first["published"]["version"]) == ("nothing_to_do", 1)
    assert first["published"]["new"] is True
    assert run_job(spec, Quiet())["published"]["new"] is False
    write_shard(place, 9, per_shard=8)
    finish(spec, "second")
    assert run_job(spec, Quiet())["published"] == {
        "name": "books-daily",
        "version": 2,
        "selection": f"{place}/store/selections/{fingerprint(['selections', 'second'])}",
        "again": None,
        "new": True,
    }
    found = open_selection(f"{place}/store#books-daily")
    assert found.manifest.inputs == {"made of": "second"}


def test_a_name_in_use_is_refused_before_any_work(place):
    finish(parse(place), "first")
    run_job(parse(place, publish="books"), Quiet())
    before = sorted((place / "store" / "runs").iterdir())
    with pytest.raises(SpecError, match=r"`selection.tau`: 8.0 there, 16.0 here"):
        run_job(parse(place, publish="books", selection={"tau": 16}), Quiet())
    assert sorted((place / "store" / "runs").iterdir()) == before


def test_publish_is_no_part_of_the_job(place):
    """The same run serves specs with and without a name; widths and stores do not own one."""
    finish(parse(place), "first")
    assert "published" not in run_job(parse(place), Quiet())
    assert run_job(parse(place, publish="a"), Quiet())["published"]["version"] == 1
    wide = parse(place, publish="b", compute={"scorers": 9}, store="elsewhere", name="x")
    assert owner(wide) == owner(parse(place))


def test_by_hand_back_and_forward(place, reports):
    spec = parse(place, publish="books")
    for word in ("first", "second"):
        write_shard(place, 9, per_shard=8 * len(word))
        finish(spec, word)
        run_job(spec, Quiet())
    store = f"{place}/store"
    code, found = reports("publish", "books", "--to", "1", "--store", store)
    assert (code, found["version"], found["again"], found["new"]) == (0, 3, 1, True)
    assert open_selection(f"{store}#books").manifest.inputs == {"made of": "first"}
    assert run_job(spec, Quiet())["published"]["new"] is False
    code, found = reports("publish", f"{store}#books")
    assert (code, found["version"], found["again"]) == (0, 4, None)
    assert open_selection(f"{store}#books").manifest.inputs == {"made of": "second"}
    code, shown = reports("status", f"{store}#books")
    assert code == 0
    assert [(v["version"], v["again"]) for v in shown["versions"]] == [
        (1, None),
        (2, None),
        (3, 1),
        (4, None),
    ]
    assert all(version["published"].endswith("+00:00") for version in shown["versions"])
    assert reports("status", store)[1]["names"] == [
        {"name": "books", "versions": shown["versions"]}
    ]


def test_by_hand_a_run_takes_its_spec_along(place, reports):
    finish(parse(place), "first")
    run_job(parse(place, publish="books"), Quiet())
    changed = parse(place, selection={"tau": 16})
    run = finish(changed, "other tau")
    store = f"{place}/store"
    assert reports("publish", "books", "--to", run, "--store", store)[1]["version"] == 2
    spec = parse(place, publish="books", selection={"tau": 16})
    assert run_job(spec, Quiet())["published"]["new"] is False
    code, found = reports("publish", "books", "--to", run, "--store", store)
    assert (code, found["new"]) == (0, False)


def test_by_hand_any_selection_of_the_store(place, reports):
    store = Store(check_store(str(place / "store")))
    uri = store.path("selections", put_selection(store, "mine"))
    assert reports("publish", "mine", "--to", uri, "--store", store.uri)[1]["selection"] == uri
    assert open_selection(f"{store.uri}#mine").uri == uri
    other = Store(check_store(str(place / "other")))
    away = other.path("selections", put_selection(other, "x"))
    code, found = reports("publish", "mine", "--to", away, "--store", store.uri)
    assert code == 3
    assert "a name refers to its own store" in found["error"]


def test_a_name_may_stand_for_a_model(tmp_path, reports):
    store = Store(check_store(str(tmp_path / "store")))
    for word in ("first", "second"):
        store.put_manifest(Manifest("models", fingerprint(word), (), {}, {}))
        uri = store.path("models", fingerprint(word))
        code, found = reports("publish", "model", "--to", uri, "--store", store.uri)
        assert code == 3 and "is no trained model (no config.json)" in found["error"]
        Path(uri, "config.json").write_bytes(b"{}")
        found = reports("publish", "model", "--to", uri, "--store", store.uri)[1]
        assert (found["model"], found["new"]) == (uri, True)
    code, found = reports("publish", "model", "--to", "1", "--store", store.uri)
    assert (code, found["model"]) == (0, store.path("models", fingerprint("first")))
    with pytest.raises(ArtifactError, match="stands for one of `models`, not a selection"):
        open_selection(f"{store.uri}#model")
    tokens = store.put_manifest(Manifest("tokens", fingerprint("t"), (), {}, {}))
    uri = store.path("tokens", tokens.fingerprint)
    code, found = reports("publish", "model", "--to", uri, "--store", store.uri)
    assert code == 3 and "is one of `tokens`: a name stands for" in found["error"]
    store.put_manifest(Manifest("distilled", fingerprint("d"), (), {}, {}))
    uri = store.path("distilled", fingerprint("d"))
    code, found = reports("publish", "model", "--to", uri, "--store", store.uri)
    assert code == 3 and "'model' stands for one of `models`" in found["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["books"], 3, "is not a store: it holds no store.json (give `--store`)"),
        (["Books!"], 2, "invalid name 'Books!': use up to 63 of"),
        (["made#books"], 3, "nothing is published under 'books'"),
        (["made#books", "--to", "4"], 3, "nothing is published under 'books'"),
        (["made#books", "--to", "runs/x"], 3, "no run"),
    ],
)
def test_what_cannot_be_published(tmp_path, monkeypatch, reports, arguments, code, sentence):
    monkeypatch.chdir(tmp_path)
    check_store("made")
    found = reports("publish", *arguments)
    assert found[0] == code
    assert sentence in found[1]["error"]


def test_prune_keeps_every_version_of_a_name(place):
    spec = parse(place, publish="books")
    store = Store(check_store(spec.store))
    for word in ("first", "second"):
        write_shard(place, 9, per_shard=8 * len(word))
        finish(spec, word)
        run_job(spec, Quiet())
    unnamed = put_selection(store, "unnamed")
    shutil.rmtree(place / "store" / "runs")
    for path in (place / "store").rglob("*"):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    gone = prune_store(store.uri, grace_hours=24, yes=True)["objects"]
    assert gone == [f"selections/about/{unnamed}/manifest.json"]
    assert open_selection(f"{store.uri}#books").manifest.inputs == {"made of": "second"}
    first = json.loads((place / "store" / "names" / "books" / "00000001.json").read_text())
    assert open_selection(store.path("selections", first["selection"])).num_rows == 0


def test_a_name_is_checked_with_the_spec():
    with pytest.raises(ValueError, match="publish"):
        parse(Path("."), publish="Books!")


def test_what_changes_nothing_of_a_selection_is_no_other_owner(place):
    """Target models and speed; what decides the selection still is another spec."""
    train = {"model": {"hidden_size": 32, "num_layers": 1}}
    finish(parse(place, publish="books", train=train), "first")
    spec = parse(place, publish="books", train=train)
    assert run_job(spec, Quiet())["published"]["version"] == 1
    others = [
        {"train": train | {"controls": ["random"]}},
        {},
        {"train": train, "scoring": {"micro_batch": 4, "compile": "off"}},
    ]
    for number, changes in enumerate(others):
        spec = parse(place, publish="books", **changes)
        finish(spec, f"of {number}")
        assert run_job(spec, Quiet())["published"]["version"] == 2 + number
    for changes in ({"selection": {"tau": 9}}, {"scoring": {"dtype": "float32"}}):
        with pytest.raises(SpecError, match="in use by another spec"):
            run_job(parse(place, publish="books", **changes), Quiet())
