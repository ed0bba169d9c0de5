"""The stage `submit` of `cluster.py`: how long a submitted job takes to begin, against a bare one.

The head is one of the benchmark's own on this machine, with a token. A part counts when its receipt
is in the store, which is a little after it was begun.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]


def measure_submit(folder: Path) -> dict[str, Any]:
    """Both on one fresh head, the bare job first and last."""
    from heads import TOKEN, clean_environment, free_ports, running_head
    from small import make_models, make_world, write_spec

    place = folder / "submit"
    shutil.rmtree(place, ignore_errors=True)
    make_world(place, shards=2)
    spec = write_spec(place, **make_models(place))
    environment = clean_environment(place) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    stillhouse = str(Path(sys.executable).with_name("stillhouse"))
    with running_head(environment, place / "head.log", free_ports(5)) as head:
        bare = [_bare(head.url, environment)]
        started = time.time()
        command = [stillhouse, "submit", spec, "--address", head.url, "--json", "--follow"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        done = time.time() - started
        receipts = (place / "store" / "scans" / "receipts").iterdir()
        first = min(path.stat().st_mtime for path in receipts) - started
        bare.append(_bare(head.url, environment))
    return {
        "bare jobs: s to their first line": bare,
        "s to the first part done": first,
        "s to the end": done,
        "s beyond a bare job": first - max(bare),
    }


def _bare(url: str, environment: dict[str, str]) -> float:
    """Seconds until a job that prints the time has done so, with Ray's own command."""
    ray = str(Path(sys.executable).with_name("ray"))
    hello = f"{sys.executable} -c 'import time; print(\"at\", time.time())'"
    started = time.time()
    command = [ray, "job", "submit", "--address", url, "--", "sh", "-c", hello]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    said = next(line for line in out.stdout.splitlines() if line.startswith("at "))
    return float(said.split()[1]) - started
