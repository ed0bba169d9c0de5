"""Every command of "A month in production" in docs/guide.md, as a shell runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import STYLES, rows, write

from stillhouse import open_selection
from stillhouse.storage import names

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
_EXIT = re.compile(r"# exit (\d)$")


def blocks(language):
    month = GUIDE.read_text().split("## A month in production")[1]
    return re.findall(rf"```{language}\n(.*?)```", month, re.S)


def commands():
    return [line for block in blocks("bash") for line in block.strip().split("\n")]


@pytest.fixture(scope="module")
def month(tmp_path_factory):
    """The folder after the month, and each command's output."""
    folder = tmp_path_factory.mktemp("month")
    [spec] = blocks("yaml")
    (folder / "nightly.yaml").write_text(spec)
    for shard in range(3):
        found = rows(100 + shard, 120, list(STYLES), prefix=f"s{shard}-")
        place = "arrived" if shard == 2 else "data/pool"
        write(folder / place / f"pool-{shard:02d}.parquet", found)
    write(folder / "data" / "books" / "sea.parquet", rows(7, 160, ["sea"], prefix="t"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100"}
    environment.pop("RAY_ADDRESS", None)
    outputs = []
    for command in commands():
        wanted = int(found[1]) if (found := _EXIT.search(command)) else 0
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == wanted, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs.append((command, done.stdout + done.stderr))
    return folder, outputs


def outputs_of(month, start):
    return [output for command, output in month[1] if command.startswith(start)]


def ids_of(folder, name):
    table = open_selection(str(folder / name)).to_arrow().read_all()
    return {one["id"] for row in table["documents"].to_pylist() for one in row}


def test_versions_and_what_they_hold(month):
    folder, _ = month
    first, second, third = (ids_of(folder, f"store#books-daily@{n}") for n in (1, 2, 3))
    assert first < second and any(one.startswith("s2-") for one in second - first)
    assert {"s0-4", "s0-8"} <= second and not {"s0-4", "s0-8"} & third
    history = names.history(str(folder / "store"), "books-daily")
    assert [one.again for one in history] == [None, None, None, 2, None]
    assert history[-1].selection == history[2].selection


def test_the_shard_that_was_cut_off_is_named_and_the_next_night_is_as_before(month):
    _, _, _, broken, after = outputs_of(month, "stillhouse run")
    assert "pool-99.parquet" in broken
    assert "nothing to do" in after


def test_the_others(month):
    folder, _ = month
    assert "stillhouse run" in outputs_of(month, "stillhouse schedule")[0]
    first, third = (
        open_selection(str(folder / f"store#books-daily@{n}")).manifest.num_rows for n in (1, 3)
    )
    [compared] = outputs_of(month, "stillhouse diff")
    both = int(re.match(r"([\d,]+) sequences are in both", compared)[1].replace(",", ""))
    assert 0 < both < first and f"{third - both} in b alone" in compared
    assert "all as the manifests say" in outputs_of(month, "stillhouse verify")[0]
    lines = [
        json.loads(line)
        for path in sorted((folder / "out" / "books").rglob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == third
