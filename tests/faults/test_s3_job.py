"""A whole job on S3: the same bytes as on local disk, however the server behaves."""

import random
from pathlib import Path

import pytest
from drivers import SECRET
from fault_proxy import FaultProxy


def test_a_store_on_s3_holds_the_same_bytes_and_no_secret(bench, expected):
    bucket = bench.bucket()
    driver = bench.start(f"s3://{bucket}/some/store")
    code, result, errors = driver.end()
    assert code == 0, errors
    assert result["run"].startswith(f"s3://{bucket}/some/store/runs/")
    assert bench.contents(f"s3://{bucket}/some/store") == expected
    written = bench.objects(bucket)
    assert any(key.endswith("/result.json") for key in written)
    folders = driver.folder, Path(driver.ray_folder)
    for path in [path for folder in folders for path in folder.rglob("*") if path.is_file()]:
        written[str(path)] = path.read_bytes()
    assert [name for name, data in written.items() if SECRET.encode() in data] == []


@pytest.mark.soak
def test_everything_on_s3_with_one_request_in_ten_failing(bench, expected):
    bucket, seed = bench.bucket(), 5
    bench.upload(bucket, "pool", "target")
    chance = random.Random(seed)
    faults = ("500", "503", "reset", "truncate")

    def rule(n, method, path):
        if n % 100 == 50:
            return "stall"
        return chance.choice(faults) if chance.random() < 0.1 else None

    with FaultProxy(bench.s3_server, rule) as proxy:
        code, _, errors = bench.start(
            f"s3://{bucket}/store",
            endpoint=proxy.url,
            pool={"path": f"s3://{bucket}/pool/*.parquet"},
            target={"path": f"s3://{bucket}/target/*.parquet", "heldout": 0.2},
        ).end()
    assert code == 0, errors
    assert set(proxy.faults) == {*faults, "stall"}
    assert bench.contents(f"s3://{bucket}/store") == expected


@pytest.mark.soak
def test_a_dead_store_ends_the_run_and_a_later_one_goes_on(bench, expected):
    bucket = bench.bucket()
    store = f"s3://{bucket}/store"
    dead = []

    def rule(n, method, path):
        if method == "PUT" and "/scores/receipts/" in path:
            dead.append(path)
        return "503" if dead else None

    with FaultProxy(bench.s3_server, rule) as proxy:
        code, result, errors = bench.start(store, endpoint=proxy.url).end()
    assert code == 4
    assert result["status"] == "error"
    assert f"{store}/" in result["error"]
    assert "Traceback" not in errors
    made = bench.contents(store)
    assert made.items() < expected.items()
    code, result, errors = bench.start(store).end()
    assert code == 0, errors
    assert result["work"]["tokens"]["reused"] == result["work"]["tokens"]["parts"]
    assert bench.contents(store) == expected


@pytest.mark.soak
@pytest.mark.parametrize("changes", [{}, {"selection": {"tau": 3}}])
def test_two_runs_at_once_share_one_store(bench, expected, changes):
    """Of one pool and the same models: both keep the same, or different shares of it."""
    store = f"s3://{bench.bucket()}/store"
    ends = [driver.end() for driver in [bench.start(store), bench.start(store, **changes)]]
    assert [code for code, _, _ in ends] == [0, 0], [errors for _, _, errors in ends]
    one, other = (result for _, result, _ in ends)
    assert one["artifacts"]["scores"] == other["artifacts"]["scores"]
    assert (one["artifacts"] == other["artifacts"]) == (not changes)
    found = bench.contents(store)
    assert expected.items() < found.items() if changes else expected == found
    assert [bench.verify(result["run"])[0] for result in (one, other)] == [0, 0]
