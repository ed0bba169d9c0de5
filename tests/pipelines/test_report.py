"""What the report of a finished job counts, against the scores that lie in its store."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillhouse.report.data import from_json


@pytest.fixture(scope="module")
def report(finished):
    return from_json((Path(finished["run"]) / "report.json").read_bytes())


@pytest.fixture(scope="module")
def losses(finished):
    """Both losses of every sequence of the pool."""
    found = {}
    for name in ("prior", "conditional"):
        folder = Path(finished["artifacts"]["scores"][name])
        parts = json.loads((folder / "manifest.json").read_text())["parts"]
        files = [folder.parents[1] / part["path"] for part in parts]
        found[name] = np.concatenate([pq.read_table(file)["value"].to_numpy() for file in files])
    return found


def test_bins_follow_the_scores(report, losses):
    scores = losses["prior"] - losses["conditional"]
    drawn = report.score_histogram
    edges = np.array(drawn.edges)
    low, high = np.quantile(scores, (0.001, 0.999))
    assert scores.min() - 1e-6 <= edges[0] <= low
    assert high <= edges[-1] <= scores.max() + 1e-6
    clipped = np.clip(scores.astype(np.float64), edges[0], edges[-1])
    assert abs(np.histogram(clipped, edges)[0] - drawn.pool).sum() <= 2  # an edge may round
    assert sum(drawn.pool) == len(scores)


def test_cells_follow_the_losses(report, losses):
    drawn = report.losses
    edges = np.array(drawn.x_edges)
    both = np.concatenate(list(losses.values()))
    assert both.min() - 1e-6 <= edges[0] and edges[-1] <= both.max() + 1e-6
    x, y = (np.clip(losses[n], edges[0], edges[-1]) for n in ("prior", "conditional"))
    wanted = np.histogram2d(x, y, [edges, edges])[0]
    assert abs(wanted - np.array(drawn.pool)).sum() <= 4  # an edge may round
    assert np.array(drawn.pool).sum() == len(x)


def test_what_others_beat_was_eligible(report):
    assert {drop.reason for drop in report.drops} & {"below the cut", "kept"} == set()
