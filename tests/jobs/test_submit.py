"""What `submit` does before a cluster has its say; tests/faults/test_submit.py has a real one."""

import shutil

import pytest
import yaml
from small import parse, small_spec, write_shard

from stillhouse.errors import InputError, SpecError
from stillhouse.jobs.submit import check_reach, submission_name
from stillhouse.storage.artifact import Store
from stillhouse.storage.names import Publication, publish_run


@pytest.fixture
def place(world, tmp_path):
    for name in ("pool", "target"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def name_of(spec):
    return submission_name(spec, check_reach(spec))


def test_one_job_has_one_name_however_wide_it_runs(place):
    name = name_of(parse(place))
    assert len(name) == 64
    assert name_of(parse(place, compute={"scorers": 9}, name="again")) == name
    others = [{"selection": {"tau": 9}}, {"store": str(place / "other")}, {"publish": "books"}]
    names = {name_of(parse(place, **changes)) for changes in others}
    assert len(names | {name}) == 4
    write_shard(place, 9, per_shard=8)
    assert name_of(parse(place)) != name


def test_the_name_needs_no_byte_of_the_data(place):
    """What cannot be listed is found; what stands in the files is the cluster's to read."""
    (place / "pool" / "pool-00.parquet").write_bytes(b"no parquet")
    assert len(name_of(parse(place))) == 64
    assert {path.name for path in (place / "store").iterdir()} == {"store.json"}


def test_what_cannot_be_reached(place):
    with pytest.raises(InputError, match="no files match"):
        check_reach(parse(place, pool={"path": str(place / "nothing")}))
    spec = parse(place, publish="books")
    check_reach(spec)
    other = Publication("s", "r", {"job": "other"}, "2026-11-01T00:00:00+00:00")
    publish_run(Store(spec.store).uri, "books", other)
    with pytest.raises(SpecError, match="`publish: books` is in use by another spec"):
        check_reach(spec)


def test_no_cluster(place, reports, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    path = place / "spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(place)))
    code, found = reports("submit", str(path), "--address", "http://127.0.0.1:1", "--follow")
    assert (code, "no Ray cluster answers at http://127.0.0.1:1" in found["error"]) == (2, True)
    code, found = reports("submit", str(path))
    assert (code, "give --address http://HOST:8265" in found["error"]) == (2, True)
