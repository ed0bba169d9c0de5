"""The jobs still give what `golden.json` says: recorded before the engine was redesigned.

What it was recorded with, and why a number changed since, is told in the changelog. To record anew:
`python tests/golden/golden_jobs.py tests/golden/golden.json`.
"""

import json
from pathlib import Path

import pytest
from golden_jobs import JOBS
from small import make_world

pytestmark = pytest.mark.soak

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
LEVEL = 0.011
"""One of the 255 steps of a stored pixel, standardised: what rounding on another CPU may move."""


def differences(place, found, wanted):
    """Where two results differ: floats by more than 1e-4, everything else at all."""
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        return [d for key in wanted for d in differences(f"{place}.{key}", found[key], wanted[key])]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (a, b) in pairs for d in differences(f"{place}[{i}]", a, b)]
    if isinstance(wanted, float) and isinstance(found, float):
        near = LEVEL if ".pixels" in place else 1e-5
        return [] if found == pytest.approx(wanted, rel=1e-4, abs=near) else [place]
    return [] if found == wanted and type(found) is type(wanted) else [place]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_gives_what_it_gave(name, ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    make_world(tmp_path, shards=2)
    found = json.loads(json.dumps(JOBS[name](tmp_path)))
    assert differences(name, found, GOLDEN[name]) == []


def test_differences_are_found():
    wanted = {"a": [1, 2.0], "pixels": [0.5]}
    assert differences("x", {"a": [1, 2.00001], "pixels": [0.51]}, wanted) == []
    assert differences("x", {"a": [2, 2.1], "pixels": [0.6]}, wanted) == [
        "x.a[0]",
        "x.a[1]",
        "x.pixels[0]",
    ]
    assert differences("x", {"a": [1], "pixels": [0.5]}, wanted) == ["x.a"]
