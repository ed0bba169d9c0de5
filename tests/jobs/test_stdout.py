"""With `--json`, stdout holds one JSON object, whatever else is printed."""

import json
import os
import threading

import pytest
import ray
import typer

from stillhouse.jobs.cluster import cluster
from stillhouse.jobs.guarded import guarded, print_json
from stillhouse.spec import ComputeSettings


@ray.remote(max_retries=1)
def dies_once(marker):
    if not os.path.exists(marker):
        open(marker, "w").close()
        os._exit(1)


def test_what_ray_says_of_a_lost_worker(ray_cluster, tmp_path, capsys):
    """A thread of Ray's prints it, in a session that the caller opened."""
    said = ""
    with cluster(ComputeSettings(), {}, num_actors=1):
        ray.get(dies_once.remote(str(tmp_path / "marker")))
        for _ in range(600):
            out, err = capsys.readouterr()
            assert out == ""
            said += err
            if "(raylet)" in said:
                break
            threading.Event().wait(0.1)
    assert "(raylet)" in said


def test_what_else_is_printed(capsys):
    """From any thread; without `--json` it is shown."""

    def action():
        other = threading.Thread(target=print, args=["from a thread"])
        other.start()
        other.join()
        print("from a library")
        print_json({"status": "done"})

    for as_json in (True, False):
        with pytest.raises(typer.Exit) as ended:
            guarded(action, as_json, debug=False)
        assert ended.value.exit_code == 0
        out, err = capsys.readouterr()
        if as_json:
            assert json.loads(out) == {"status": "done"}
            assert err == "from a thread\nfrom a library\n"
        else:
            assert out.startswith("from a thread\nfrom a library\n{")
