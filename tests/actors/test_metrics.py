"""The metrics that a node exports, read as Prometheus reads them."""

import re
from uuid import uuid4

import pytest
import ray
import requests
from exported import exported_names
from ray.util.metrics import Gauge
from small import Quiet

from stillhouse.actors.metrics import METRICS
from stillhouse.pipelines.context import Context
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store


def scrape(run, wanted=frozenset(), unwanted=frozenset()):
    """The samples of a run as {name: {labels: value}}, once all `wanted` names are among them and
    none of the `unwanted`.
    """
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while True:
        found = {}
        for line in requests.get(url, timeout=30).text.splitlines():
            sample = re.fullmatch(r"(ray_stillhouse\w+)\{(.*)\} (\S+)", line)
            labels = dict(re.findall(r'(\w+)="([^"]*)"', sample[2])) if sample else {}
            if labels.get("run") == run:
                ours = tuple(labels.get(n) for n in ("step", "model", "reason", "source"))
                found.setdefault(sample[1], {})[ours] = float(sample[3])
        if wanted <= set(found) and not unwanted & set(found):
            return found


def test_nodes_export_what_is_recorded(ray_cluster, tmp_path):
    run = uuid4().hex
    ctx = Context(Store(str(tmp_path)), ComputeSettings(), Quiet(), run=run)
    with ctx.step("score prior", total=5, reused=2) as advance:
        advance(1, 1000)
        advance(1, 500)
    with ctx.step("scan", total=1, reused=0, unit="chars") as advance:
        advance(1, 77)
    worker = ray.remote(lambda metrics: metrics.part(2.0, 0.5))
    ray.get(worker.remote(ctx.metrics("score prior")))
    ctx.metrics("scan").dead_letters("pool", 3)
    ctx.metrics("scan").in_flight(2)
    ctx.metrics("scan").retry("hardware")

    wanted = {name for metric in METRICS for name in exported_names(metric)}
    found = scrape(run[:12], wanted)
    score, scan = ("score", "prior", None, None), ("scan", "", None, None)
    assert found["ray_stillhouse_parts_expected"] == {score: 3, scan: 1}
    assert found["ray_stillhouse_parts_total"] == {score: 2, scan: 1}
    assert found["ray_stillhouse_tokens_total"] == {score: 1500}
    assert found["ray_stillhouse_part_seconds_sum"] == {score: 2.0}
    assert found["ray_stillhouse_data_wait_seconds_total"] == {score: 0.5}
    assert found["ray_stillhouse_parts_in_flight"] == {(None,) * 4: 2}
    assert found["ray_stillhouse_retries_total"] == {(None, None, "hardware", None): 1}
    assert found["ray_stillhouse_dead_letters"] == {(None, None, None, "pool"): 3}


GAUGES = {f"ray_{name}" for name, metric in METRICS.items() if metric.kind == "gauge"}


@pytest.mark.soak
def test_gauges_are_exported_as_long_as_their_run_lasts(ray_cluster, tmp_path):
    """A gauge that is set only once shows when a node has dropped it."""
    run = uuid4().hex
    ctx = Context(Store(str(tmp_path)), ComputeSettings(), Quiet(), run=run)
    ctx.metrics("scan").in_flight(1)
    ctx.metrics("scan").dead_letters("pool", 3)
    with ctx.step("score prior", total=5, reused=2) as advance:
        advance(1, 1000)
        once = Gauge("stillhouse_told_once", "", ("run",))
        once.set(1.0, {"run": run[:12]})
        scrape(run[:12], GAUGES | {"ray_stillhouse_told_once"})
        found = scrape(run[:12], unwanted={"ray_stillhouse_told_once"})
        assert set(found) >= GAUGES
        assert found["ray_stillhouse_parts_expected"] == {("score", "prior", None, None): 3}
        assert found["ray_stillhouse_parts_in_flight"] == {(None,) * 4: 1}
        assert found["ray_stillhouse_dead_letters"] == {(None, None, None, "pool"): 3}
    ctx.metrics("").forget()
    assert not GAUGES & set(scrape(run[:12], unwanted=GAUGES))
