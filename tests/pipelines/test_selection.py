"""Selections from the scores of the finished job, and what its report counts of them."""

import numpy as np
import pytest
from small import LEARNING, MODEL, Quiet, parse

from stillhouse import open_artifact, open_selection
from stillhouse.errors import BudgetError
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.report.page import read
from stillhouse.storage.parquet import read_table

pytestmark = pytest.mark.usefixtures("finished")


@pytest.fixture
def kept(world):
    """Runs the small job with another `selection` section: the selection that it makes."""

    def call(**settings):
        return open_selection(run_job(parse(world, selection=settings), Quiet())["run"])

    return call


@pytest.fixture(scope="module")
def losses(finished):
    """Both losses of every sequence of the pool, in the order of the parts: float32 [n]."""
    uris = {name: finished["artifacts"]["scores"][name] for name in ("prior", "conditional")}
    return {
        name: np.concatenate(
            [read_table(p.uri)["value"].to_numpy() for p in open_artifact(uri).parts]
        )
        for name, uri in uris.items()
    }


@pytest.fixture(scope="module")
def color(losses):
    return losses["prior"] - losses["conditional"]


def scores(selection):
    return np.sort(selection.to_arrow(["score"]).read_all()["score"].to_numpy())[::-1]


def test_fraction_keeps_the_best_of_all(kept, color, finished):
    selection = kept(fraction=0.25, exclude_contaminated=False, exclude_prior_rows=False)
    count = len(color) // 4
    assert selection.num_rows == count
    np.testing.assert_array_equal(scores(selection), np.sort(color)[::-1][:count])
    tally, trained = selection.manifest.totals["tally"], 6000 // 32
    assert tally["fates"]["prior row"] == tally["fates"]["contaminated"] == 0
    assert tally["seen"][0] == trained
    # `auto` excludes rows of the prior: they are more than 2 % of this pool
    fates = finished["selection"]["fates"]
    assert 0 < fates["prior row"] <= trained <= fates["prior row"] + fates["contaminated"]


def test_min_score_keeps_everything_from_there(kept, color):
    selection = kept(min_score=1.0, exclude_contaminated=False, exclude_prior_rows=False)
    assert selection.num_rows == (color >= 1).sum() > 0
    assert scores(selection)[-1] >= 1


def test_threshold_of_another_selection(kept, finished):
    selection = kept(threshold_from=finished["run"])
    assert selection.num_rows == finished["selection"]["num_sequences"]
    assert selection.threshold == finished["selection"]["threshold"]


def test_documents(kept, finished):
    selection = kept(tau=8, grain="documents")
    budget = int(open_artifact(finished["artifacts"]["tokens"]).num_tokens / 8)
    assert budget - 200 < selection.num_tokens <= budget
    table = selection.to_arrow().read_all()
    places = set(zip(table["part"].to_pylist(), table["raw_row"].to_pylist(), strict=True))
    assert len(places) == len(set(table["id"].to_pylist())) == table.num_rows
    assert sum(table["num_tokens"].to_pylist()) == selection.num_tokens
    assert table["source"].to_pylist().count("sea") > 0.8 * table.num_rows
    assert all(len(text.split()) >= 40 for text in table["text"].to_pylist())
    assert selection.provenance(0)["raw_file"].endswith(".parquet")
    assert verify(selection.uri, 4)["problems"] == []


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"max_share": 0.29}, {"sea": 29}),
        ({"max_share": {"sea": 0.5}, "min_share": {"law": 0.21}}, {"sea": 50, "law": 21}),
    ],
)
def test_shares_are_exact(kept, shares, expected):
    selection = kept(num_tokens=3210, **shares)  # 100 sequences of 32
    sources = selection.manifest.totals["tally"]["sources"]
    found = {name: source["kept_rows"] for name, source in sources.items()}
    assert sum(found.values()) == 100
    assert {name: found[name] for name in expected} == expected
    assert max(found.values()) == found["sea"]
    verified = verify(selection.uri, 4)
    assert verified["problems"] == []
    assert verified["checked"]["cuts"] == 1


def test_a_threshold_that_nothing_reaches(kept):
    with pytest.raises(BudgetError, match="nothing reaches the threshold 99: lower `min_score`"):
        kept(min_score=99)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tau": 1}, "1,253 are left: keep less"),
        ({"tau": 2, "max_share": 0.2}, "`max_share` and the pool allow"),
        ({"tau": 2, "min_share": {"sea": 0.9}}, "`min_share` of source 'sea' asks for"),
    ],
)
def test_refused_before_a_model_is_trained(world, settings, expected):
    """With a prior that no earlier job has trained, in the store that has the tokens."""
    listener = Quiet()
    prior = {"model": MODEL, "num_tokens": 6000, "seed": 77, **LEARNING}
    with pytest.raises(BudgetError) as refused:
        run_job(parse(world, prior=prior, selection=settings), listener)
    assert expected in str(refused.value)
    assert not [step for step, *_ in listener.steps if "train" in step]


@pytest.fixture(scope="module")
def report(finished):
    return read(finished["run"])


def test_the_report_draws_the_scores_and_losses_of_the_store(report, losses, color):
    (drawn,) = report.find("scores", "histogram")
    edges = np.array(drawn.edges)
    low, high = np.quantile(color, (0.001, 0.999))
    assert color.min() - 1e-6 <= edges[0] <= low
    assert high <= edges[-1] <= color.max() + 1e-6
    clipped = np.clip(color.astype(np.float64), edges[0], edges[-1])
    assert abs(np.histogram(clipped, edges)[0] - drawn.pool).sum() <= 2  # an edge may round
    assert sum(drawn.pool) == len(color)

    (drawn,) = report.find("scores", "cells")
    edges = np.array(drawn.edges)
    both = np.concatenate(list(losses.values()))
    assert both.min() - 1e-6 <= edges[0] and edges[-1] <= both.max() + 1e-6
    x, y = (np.clip(values, edges[0], edges[-1]) for values in losses.values())
    wanted = np.histogram2d(x, y, [edges, edges])[0]
    assert abs(wanted - np.array(drawn.pool)).sum() <= 4
    assert np.array(drawn.pool).sum() == len(x)


def test_the_report_tells_sources_by_what_was_kept(report, finished):
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
    (drops,) = report.find("dropped", "table")
    assert {row[0] for row in drops.rows} & {"below the cut", "kept"} == set()


def test_the_report_compares_target_losses_with_the_baseline(report, finished):
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
