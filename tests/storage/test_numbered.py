from concurrent.futures import ThreadPoolExecutor

from stillhouse.storage import numbered
from stillhouse.storage.commit import create
from stillhouse.storage.filesystem import join, list_names


def test_numbers(folder):
    names = join(folder, "names", "mine")
    assert numbered.versions(names) == []
    assert numbered.current(names) is None
    assert [numbered.append(names, {"selection": s}) for s in "aba"] == [1, 2, 3]
    assert numbered.current(names) == {"selection": "a"}
    assert numbered.read_version(names, 2) == {"selection": "b"}
    assert list_names(names) == ["00000001.json", "00000002.json", "00000003.json"]


def test_other_names_do_not_count(folder):
    numbered.append(folder, {"x": 1})
    for name in ("00000007.json.0123.tmp", "notes.json", "00000009.txt"):
        create(join(folder, name), b"{")
    assert numbered.versions(folder) == [1]
    assert numbered.append(folder, {"x": 2}) == 2


def test_racing_appends_get_a_number_each(folder):
    with ThreadPoolExecutor(16) as threads:
        numbers = list(threads.map(lambda i: numbered.append(folder, {"by": i}), range(16)))
    assert sorted(numbers) == list(range(1, 17))
    assert [numbered.read_version(folder, n)["by"] for n in numbers] == list(range(16))


def test_append_whose_answer_was_lost_is_not_done_twice(bucket, proxied):
    proxied.rule = lambda n, method, path: "lose answer" if (method, n) == ("PUT", 2) else None
    assert numbered.append(f"{bucket}/names/mine", {"selection": "a"}) == 1
    assert "lose answer" in proxied.faults
    assert numbered.versions(f"{bucket}/names/mine") == [1]
