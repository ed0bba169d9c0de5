"""Published names on a local folder and on S3."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from stillhouse.errors import ArtifactError, SpecError
from stillhouse.storage import names
from stillhouse.storage.filesystem import join, list_names, read_bytes
from stillhouse.storage.names import Publication, publish_by_hand, publish_run, roll_back

SPEC = {"job": "select", "selection": {"tau": 8.0}, "pool": {"path": "pool/*.parquet"}}


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
    assert current(folder) == (3, "a")
    assert names.published_names(folder) == ["books"]
    assert list_names(join(folder, "names", "books"))[-1] == "00000003.json"


def test_the_same_result_is_not_published_again(folder):
    publish_run(folder, "books", made("a"))
    before = read_bytes(join(folder, "names", "books", "00000001.json"))
    version, new = publish_run(folder, "books", made("a", started="2026-11-02T03:00:00+00:00"))
    assert (version.number, new) == (1, False)
    assert list_names(join(folder, "names", "books")) == ["00000001.json"]
    assert read_bytes(join(folder, "names", "books", "00000001.json")) == before


def test_a_roll_back_stands_until_there_is_something_new(folder):
    for selection in "abc":
        publish_run(folder, "books", made(selection))
    version, new = roll_back(folder, "books", 1)
    assert (version.number, version.selection, version.again, new) == (4, "a", 1, True)
    assert roll_back(folder, "books", 1)[1] is False
    assert publish_run(folder, "books", made("c"))[1] is False
    assert current(folder) == (4, "a")
    assert publish_run(folder, "books", made("d"))[1] is True
    assert current(folder) == (5, "d")


def test_forward_again_without_a_number(folder):
    for selection in "ab":
        publish_run(folder, "books", made(selection))
    roll_back(folder, "books", 1)
    version, new = roll_back(folder, "books")
    assert (version.number, version.selection, version.again, new) == (4, "b", None, True)
    assert roll_back(folder, "books") == (version, False)


def test_a_slow_run_does_not_publish_older_data_over_newer(folder):
    publish_run(folder, "books", made("21 shards", started="2026-11-02T03:00:00+00:00"))
    version, new = publish_run(folder, "books", made("20 shards"))
    assert (version.selection, new) == ("21 shards", False)


def test_another_spec_is_refused_and_told_why(folder):
    publish_run(folder, "books", made("a"))
    other = {"job": "select", "selection": {"tau": 16.0, "seed": 1}, "pool": SPEC["pool"]}
    with pytest.raises(SpecError) as refused:
        publish_run(folder, "books", made("b", spec=other))
    assert "`publish: books` is in use by another spec" in str(refused.value)
    assert "`selection.seed`: default there, 1 here" in str(refused.value)
    assert "`selection.tau`: 8.0 there, 16.0 here" in str(refused.value)
    assert f"stillhouse publish books --to RUN --store {folder}" in str(refused.value)
    assert current(folder) == (1, "a")
    names.check_owner(names.current(folder, "books"), "books", SPEC, folder)


def test_a_name_is_handed_over_by_hand(folder):
    publish_run(folder, "books", made("a"))
    other = SPEC | {"selection": {"tau": 16.0}}
    assert publish_by_hand(folder, "books", "a", made("a", spec=other))[1] is True
    assert publish_by_hand(folder, "books", "a", made("a", spec=other))[1] is False
    assert publish_run(folder, "books", made("b", spec=other))[1] is True
    with pytest.raises(SpecError, match="in use by another spec"):
        publish_run(folder, "books", made("c"))


def test_by_hand_any_selection_and_the_owner_stays(folder):
    version, _ = publish_by_hand(folder, "books", "x")
    assert version == names.Version(1, "x")
    with pytest.raises(ArtifactError, match="no run has published under 'books'"):
        roll_back(folder, "books")
    publish_run(folder, "books", made("a"))
    publish_by_hand(folder, "books", "x")
    assert names.current(folder, "books").last == made("a")
    assert publish_run(folder, "books", made("a"))[1] is False


def test_what_cannot_be_rolled_back_to(folder):
    with pytest.raises(ArtifactError, match="nothing is published under 'books'"):
        roll_back(folder, "books", 1)
    publish_run(folder, "books", made("a"))
    with pytest.raises(ArtifactError, match="'books' has no version 7: it has 1 to 1"):
        roll_back(folder, "books", 7)


def test_racing_runs_of_one_result_make_one_version(folder):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: publish_run(folder, "books", made("a")), range(8)))
    assert [version.number for version, _ in found] == [1] * 8
    assert sum(new for _, new in found) == 1


def test_racing_runs_end_with_the_one_that_began_last(folder):
    """Whoever is overtaken by a later run steps back; versions are whole and without gaps."""
    days = [made(f"day {d}", started=f"2026-11-{d:02d}T03:00:00+00:00") for d in range(1, 9)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda day: publish_run(folder, "books", day), days))
    history = names.history(folder, "books")
    assert [version.number for version in history] == list(range(1, len(history) + 1))
    assert [v.last.started for v in history] == sorted(v.last.started for v in history)
    assert history[-1].selection == "day 8"


def test_a_put_whose_answer_was_lost_is_not_done_twice(bucket, proxied):
    proxied.rule = lambda n, method, path: "lose answer" if (method, n) == ("PUT", 2) else None
    version, _ = publish_run(bucket, "books", made("a"))
    assert "lose answer" in proxied.faults
    assert names.history(bucket, "books") == [version]


def test_publishing_takes_three_requests_whatever_the_history(bucket, proxied):
    """A listing, the current version, and the put."""
    for number in range(20):
        publish_run(bucket, "books", made(str(number)))
    before = len(proxied.requests)
    publish_run(bucket, "books", made("new"))
    assert [method for method, _ in proxied.requests[before:]] == ["GET", "GET", "PUT"]


@pytest.mark.parametrize("name", ["", "Books", "a/b", "a b", ".hidden", "x" * 64, "-x", "x\n"])
def test_bad_names(name):
    with pytest.raises(SpecError, match="is no name"):
        names.split_name(f"./store#{name}")


def test_names_with_and_without_a_store():
    assert names.split_name("s3://b/p#books-daily") == ("s3://b/p", "books-daily")
    assert names.split_name("books-daily", "./store") == ("./store", "books-daily")
