"""Published names on a local folder and on S3."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from stillhouse.errors import ArtifactError, SpecError
from stillhouse.storage import names
from stillhouse.storage.filesystem import join, list_names, read_bytes
from stillhouse.storage.names import Publication, publish_by_hand, publish_run, roll_back

SPEC = {"job": "select", "selection": {"tau": 8.0}, "pool": {"path": "pool/*.parquet"}}
OTHER = SPEC | {"selection": {"tau": 16.0, "seed": 1}}


def made(selection, started="2026-11-01T03:00:00+00:00", spec=SPEC):
    return Publication(selection, f"run of {selection}", spec, started)


def current(folder):
    found = names.current(folder, "books")
    return found.number, found.selection


def test_each_new_result_is_a_version(folder):
    assert names.current(folder, "books") is None
    assert names.published_names(folder) == names.history(folder, "books") == []
    for number, selection in enumerate("aba", start=1):
        version, new = publish_run(folder, "books", made(selection))
        assert (version.number, version.selection, new) == (number, selection, True)
    assert [v.selection for v in names.history(folder, "books")] == ["a", "b", "a"]
    assert names.published_names(folder) == ["books"]
    before = read_bytes(join(folder, "names", "books", "00000003.json"))
    version, new = publish_run(folder, "books", made("a", started="2026-11-02T03:00:00+00:00"))
    assert (version.number, new) == (3, False)
    assert list_names(join(folder, "names", "books"))[-1] == "00000003.json"
    assert read_bytes(join(folder, "names", "books", "00000003.json")) == before


def test_roll_backs_stay_until_there_is_a_new_result(folder):
    with pytest.raises(ArtifactError, match="nothing is published under 'books'"):
        roll_back(folder, "books", 1)
    for selection in "abc":
        publish_run(folder, "books", made(selection))
    version, new = roll_back(folder, "books", 1)
    assert (version.number, version.selection, version.again, new) == (4, "a", 1, True)
    assert roll_back(folder, "books", 1)[1] is False
    assert publish_run(folder, "books", made("c"))[1] is False
    assert current(folder) == (4, "a")
    version, new = roll_back(folder, "books")  # forward, to what a run published last
    assert (version.number, version.selection, version.again, new) == (5, "c", None, True)
    assert roll_back(folder, "books") == (version, False)
    assert publish_run(folder, "books", made("d"))[1] is True
    assert current(folder) == (6, "d")
    with pytest.raises(ArtifactError, match="'books' has no version 7: it has 1 to 6"):
        roll_back(folder, "books", 7)


def test_a_slow_run_does_not_publish_older_data_over_newer(folder):
    publish_run(folder, "books", made("21 shards", started="2026-11-02T03:00:00+00:00"))
    version, new = publish_run(folder, "books", made("20 shards"))
    assert (version.selection, new) == ("21 shards", False)


def test_another_spec_is_refused_until_the_name_is_handed_over(folder):
    publish_run(folder, "books", made("a"))
    with pytest.raises(SpecError) as refused:
        publish_run(folder, "books", made("b", spec=OTHER))
    assert "`publish: books` is in use by another spec" in str(refused.value)
    assert "`selection.seed`: default there, 1 here" in str(refused.value)
    assert "`selection.tau`: 8.0 there, 16.0 here" in str(refused.value)
    assert f"stillhouse publish books --to RUN --store {folder}" in str(refused.value)
    assert current(folder) == (1, "a")
    names.check_owner(names.current(folder, "books"), "books", SPEC, folder)
    assert publish_by_hand(folder, "books", "a", made("a", spec=OTHER))[1] is True
    assert publish_by_hand(folder, "books", "a", made("a", spec=OTHER))[1] is False
    assert publish_run(folder, "books", made("b", spec=OTHER))[1] is True
    with pytest.raises(SpecError, match="in use by another spec"):
        publish_run(folder, "books", made("c"))


def test_by_hand_any_selection_is_published_and_the_owner_stays(folder):
    version, _ = publish_by_hand(folder, "books", "x")
    assert version == names.Version(1, "x")
    with pytest.raises(ArtifactError, match="no run has published under 'books'"):
        roll_back(folder, "books")
    publish_run(folder, "books", made("a"))
    publish_by_hand(folder, "books", "x")
    assert names.current(folder, "books").last == made("a")
    assert publish_run(folder, "books", made("a"))[1] is False


def test_racing_runs(folder):
    """Runs of one result make one version; of several the one that began last is current."""
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: publish_run(folder, "books", made("a")), range(8)))
    assert [version.number for version, _ in found] == [1] * 8
    assert sum(new for _, new in found) == 1
    days = [made(f"day {d}", started=f"2026-11-{d:02d}T04:00:00+00:00") for d in range(1, 9)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda day: publish_run(folder, "books", day), days))
    history = names.history(folder, "books")
    assert [version.number for version in history] == list(range(1, len(history) + 1))
    assert [v.last.started for v in history] == sorted(v.last.started for v in history)
    assert history[-1].selection == "day 8"


def test_requests(bucket, proxied):
    """A listing, the current version and the put, whatever the history; a lost answer once more."""
    proxied.rule = lambda n, method, path: "lose answer" if (method, n) == ("PUT", 2) else None
    version, _ = publish_run(bucket, "books", made("a"))
    assert "lose answer" in proxied.faults
    assert names.history(bucket, "books") == [version]
    for number in range(9):
        publish_run(bucket, "books", made(str(number)))
    before = len(proxied.requests)
    publish_run(bucket, "books", made("new"))
    assert [method for method, _ in proxied.requests[before:]] == ["GET", "GET", "PUT"]


@pytest.mark.parametrize("name", ["", "Books", "a/b", "a b", ".hidden", "x" * 64, "-x", "x\n"])
def test_names_of_specs(name):
    with pytest.raises(SpecError, match="invalid name"):
        names.split_name(f"./store#{name}")
    assert names.split_name("s3://b/p#books-daily") == ("s3://b/p", "books-daily")
    assert names.split_name("books-daily", "./store") == ("./store", "books-daily")


def test_a_name_at_a_version(folder):
    for selection in "ab":
        publish_run(folder, "books", made(selection))
    assert [names.published(folder, n).selection for n in ("books", "books@1")] == ["b", "a"]
    for wrong, message in (
        ("books@3", "no version 3: it has 1 to 2"),
        ("books@last", "a version is a number: `books@2`"),
        ("other@1", "nothing is published under 'other'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            names.published(folder, wrong)


def test_a_release_that_knows_more_sections_has_the_same_spec(folder):
    publish_run(folder, "books", made("a"))
    newer = SPEC | {"decontaminate": [], "evaluate": {"tasks": ["copa"]}, "targets": {}, "x": None}
    version, new = publish_run(folder, "books", made("b", spec=newer))
    assert new and version.number == 2
    training = {"job": "train", "data": {"path": "x"}}
    publish_run(folder, "model", made("c", spec=training))
    measured = training | {"evaluate": {"tasks": ["copa"]}}
    assert publish_run(folder, "model", made("d", spec=measured))[1]
