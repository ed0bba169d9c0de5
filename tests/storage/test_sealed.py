"""JSON that carries its own digest: any changed byte is found, and what was made before is read."""

import hashlib
import json

import pytest

from stillhouse.errors import ArtifactError
from stillhouse.storage import numbered
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import join, read_bytes
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


@pytest.mark.parametrize("indent", [None, 1])
def test_every_flipped_bit_is_found(indent):
    data = seal(CONTENT, indent)
    assert unseal(data, "here") == READ
    for place in range(len(data)):
        for bit in range(8):
            broken = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            with pytest.raises(ArtifactError, match=r"^here "):
                unseal(broken, "here")


def test_what_was_made_before_there_were_digests():
    assert unseal(b'{"format_version":1,"rows":3}', "here") == {"rows": 3}
    assert unseal(b'{"rows":3}', "here") == {"rows": 3}


def test_a_pin_of_another_value_is_refused(store):
    folder = store.path("pins", "prior")
    numbered.append(folder, {"models": "a"})
    uri = join(folder, "00000001.json")
    replace(uri, read_bytes(uri).replace(b'"a"', b'"b"'))
    with pytest.raises(ArtifactError, match=r"00000001\.json is not what was written"):
        numbered.current(folder)
