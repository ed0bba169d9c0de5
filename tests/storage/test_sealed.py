"""JSON that carries its own digest, and numbered objects of it."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from stillhouse.errors import ArtifactError
from stillhouse.storage import numbered
from stillhouse.storage.commit import create, replace
from stillhouse.storage.filesystem import join, list_names, read_bytes
from stillhouse.storage.sealed import seal, unseal

CONTENT = {"rows": 3, "share": 1e-07, "name": "épée", "by": {1: [None, True], 10: "x", 2: -1.5}}
READ = CONTENT | {"by": {"1": [None, True], "10": "x", "2": -1.5}}


def test_the_digest_is_the_sha256_of_the_rest():
    data = seal(CONTENT)
    content = json.loads(data)
    digest = content.pop("sha256")
    rest = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    assert digest == hashlib.sha256(rest).hexdigest()
    assert content.pop("format_version") == 2
    assert content == READ == unseal(data, "here")
    # objects of format 1 have no digest
    assert unseal(b'{"format_version":1,"rows":3}', "here") == {"rows": 3}
    assert unseal(b'{"rows":3}', "here") == {"rows": 3}


@pytest.mark.parametrize("indent", [None, 1])
def test_every_flipped_bit_is_found(indent):
    data = seal(CONTENT, indent)
    assert unseal(data, "here") == READ
    for place in range(len(data)):
        for bit in range(8):
            broken = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            with pytest.raises(ArtifactError, match=r"^here "):
                unseal(broken, "here")


def test_numbered_objects(folder):
    names = join(folder, "names", "mine")
    assert numbered.versions(names) == []
    assert numbered.current(names) is None
    assert [numbered.append(names, {"selection": s}) for s in "aba"] == [1, 2, 3]
    assert numbered.current(names) == {"selection": "a"}
    assert numbered.read_version(names, 2) == {"selection": "b"}
    assert list_names(names) == ["00000001.json", "00000002.json", "00000003.json"]
    for name in ("00000007.json.0123.tmp", "notes.json", "00000009.txt"):
        create(join(names, name), b"{")
    assert numbered.versions(names) == [1, 2, 3]
    uri = join(names, "00000003.json")
    replace(uri, read_bytes(uri).replace(b'"a"', b'"b"'))
    with pytest.raises(ArtifactError, match=r"00000003\.json is not what was written"):
        numbered.current(names)


def test_racing_appends_get_a_number_each(folder):
    with ThreadPoolExecutor(16) as threads:
        numbers = list(threads.map(lambda i: numbered.append(folder, {"by": i}), range(16)))
    assert sorted(numbers) == list(range(1, 17))
    assert [numbered.read_version(folder, n)["by"] for n in numbers] == list(range(16))


def test_append_whose_answer_was_lost_is_not_repeated(bucket, proxied):
    proxied.rule = lambda n, method, path: "lose answer" if (method, n) == ("PUT", 2) else None
    assert numbered.append(f"{bucket}/names/mine", {"selection": "a"}) == 1
    assert "lose answer" in proxied.faults
    assert numbered.versions(f"{bucket}/names/mine") == [1]
