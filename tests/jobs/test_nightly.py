"""Three nights of a schedule: all is new, nothing is new, one shard of twenty is new."""

import json
import subprocess
import sys

import pytest
from small import Quiet, make_world, parse, small_spec, write_shard, write_spec

from stillhouse import open_selection
from stillhouse.jobs.publish import names_of
from stillhouse.jobs.run import run_job

SCORED = ("score prior", "score conditional", "contamination")


def made(result):
    """Parts that each step did not find finished."""
    return {step: work["parts"] - work["reused"] for step, work in result["work"].items()}


def again(spec):
    """The job in a process of its own, as cron starts it; which of Ray and torch it imported."""
    code = (
        "import sys; from stillhouse.jobs.cli import app\n"
        "try: app(['run', sys.argv[1], '--json'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print(sorted({'ray', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout), done.stderr


@pytest.mark.soak
def test_three_nights(ray_cluster, untrained, tmp_path):
    """The second night starts no actor: without Ray there is none."""
    nightly = {**untrained, "part_tokens": 1000, "publish": "nightly"}
    make_world(tmp_path, shards=19, per_shard=12)
    first = run_job(parse(tmp_path, **nightly), Quiet())
    assert first["published"]["version"] == 1
    assert made(first)["tokens"] >= 19

    second, imported = again(write_spec(tmp_path, **nightly))
    assert (second["status"], imported) == ("nothing_to_do", "[]\n")
    assert set(made(second).values()) == {0}
    assert second["published"] == first["published"] | {"new": False}

    write_shard(tmp_path, 19, per_shard=12)
    third = run_job(parse(tmp_path, **nightly), Quiet())
    assert (made(third)["scan"], made(third)["tokens"]) == (1, 1)
    for step in SCORED:
        assert third["work"][step]["reused"] == first["work"][step]["parts"]
        assert made(third)[step] == made(third)["score prior"] > 0
    assert third["published"]["version"] == 2
    store = small_spec(tmp_path)["store"]
    assert [v["version"] for v in names_of(store)[0]["versions"]] == [1, 2]
    newest = open_selection(f"{store}#nightly").manifest.fingerprint
    assert newest == third["selection_fingerprint"] != first["selection_fingerprint"]
