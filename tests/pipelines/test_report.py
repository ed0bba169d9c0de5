"""What the report of a finished job counts, against the scores that lie in its store."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stillhouse.report.page import read


@pytest.fixture(scope="module")
def report(finished):
    return read(finished["run"])


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
    (drawn,) = report.find("scores", "histogram")
    edges = np.array(drawn.edges)
    low, high = np.quantile(scores, (0.001, 0.999))
    assert scores.min() - 1e-6 <= edges[0] <= low
    assert high <= edges[-1] <= scores.max() + 1e-6
    clipped = np.clip(scores.astype(np.float64), edges[0], edges[-1])
    assert abs(np.histogram(clipped, edges)[0] - drawn.pool).sum() <= 2  # an edge may round
    assert sum(drawn.pool) == len(scores)


def test_cells_follow_the_losses(report, losses):
    (drawn,) = report.find("scores", "cells")
    edges = np.array(drawn.edges)
    both = np.concatenate(list(losses.values()))
    assert both.min() - 1e-6 <= edges[0] and edges[-1] <= both.max() + 1e-6
    x, y = (np.clip(losses[n], edges[0], edges[-1]) for n in ("prior", "conditional"))
    wanted = np.histogram2d(x, y, [edges, edges])[0]
    assert abs(wanted - np.array(drawn.pool)).sum() <= 4  # an edge may round
    assert np.array(drawn.pool).sum() == len(x)


def test_what_others_beat_was_eligible(report):
    (drops,) = report.find("dropped", "table")
    assert {row[0] for row in drops.rows} & {"below the cut", "kept"} == set()


def test_sources_by_what_was_kept(report, finished):
    """Shares, ratio and order against the counts of `run --json`."""
    (table,) = report.find("sources", "table")
    found = finished["selection"]["sources"]
    pool, kept = (sum(s[k] for s in found.values()) for k in ("pool_tokens", "kept_tokens"))
    widest = max(max(row[2:4]) for row in table.rows)
    for name, bars, ours, theirs, ratio, _ in table.rows:
        assert bars == pytest.approx([ours / widest, theirs / widest])
        assert ours == pytest.approx(found[name]["pool_tokens"] / pool)
        assert theirs == pytest.approx(found[name]["kept_tokens"] / kept)
        assert ratio == pytest.approx(theirs / ours)
    assert [row[3] for row in table.rows] == sorted((row[3] for row in table.rows), reverse=True)
    assert {row[0] for row in table.rows} == set(found)


def test_target_losses_against_the_baseline(report, finished):
    (table,) = report.find("target", "table")
    found = {name: row["heldout_nll"] for name, row in finished["target"].items()}
    rows = {row[0].replace(" ", "_"): row for row in table.rows}
    assert {name: row[2][0] for name, row in rows.items()} == pytest.approx(found)
    assert rows["random"][3] is None
    assert rows["color"][3] == [pytest.approx(found["color"] - found["random"]), None]
    (story,) = (b for b in report.find("lead", "text") if b.role == "story")
    gain = abs(found["color"] - found["random"])
    assert f"{gain:.2f} nats" in story.text and "in one run of each." in story.text
    assert "One seed" in report.find("target", "text")[-1].text
