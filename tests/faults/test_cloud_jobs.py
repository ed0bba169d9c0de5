"""A whole job on the other object stores: pool, target and store."""

import pytest

from stillhouse.storage.filesystem import filesystem


@pytest.mark.soak
@pytest.mark.parametrize("place", ["gcs_bucket", "container"])
def test_a_job_leaves_the_same_bytes(bench, expected, request, place):
    uri = request.getfixturevalue(place)
    fs, root = filesystem(uri)
    for folder in ("pool", "target"):
        for path in (bench.job.folder / folder).iterdir():
            fs.pipe_file(f"{root}/{folder}/{path.name}", path.read_bytes())
    inputs = {
        "pool": {"path": f"{uri}/pool/*.parquet"},
        "target": {"path": f"{uri}/target/*.parquet", "heldout": 0.2},
    }
    code, result, errors = bench.start(f"{uri}/store", **inputs).end()
    assert code == 0, errors
    assert result["run"].startswith(f"{uri}/store/runs/")
    assert bench.contents(f"{uri}/store") == expected
    code, found = bench.verify(f"{uri}/store")
    assert code == 0, found
