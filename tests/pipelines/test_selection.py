"""What is kept under each rule, on the scores of the finished job."""

import numpy as np
import pytest
from small import LEARNING, MODEL, Quiet, parse

from stillhouse import open_artifact, open_selection
from stillhouse.errors import BudgetError
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify
from stillhouse.storage.parquet import read_table

pytestmark = pytest.mark.usefixtures("finished")


@pytest.fixture
def kept(world):
    """Runs the small job with another `selection` section: the selection that it makes."""

    def call(**settings):
        return open_selection(run_job(parse(world, selection=settings), Quiet())["run"])

    return call


@pytest.fixture(scope="module")
def pool(finished):
    return open_artifact(finished["artifacts"]["tokens"])


@pytest.fixture(scope="module")
def color(finished):
    """Every row's score, in the order of the parts: float32 [n]."""
    values = [
        np.concatenate([read_table(p.uri)["value"].to_numpy() for p in open_artifact(uri).parts])
        for uri in (finished["artifacts"]["scores"][n] for n in ("prior", "conditional"))
    ]
    return values[0] - values[1]


def scores(selection):
    return np.sort(selection.to_arrow(["score"]).read_all()["score"].to_numpy())[::-1]


def test_fraction_is_the_best_of_all(kept, color):
    selection = kept(fraction=0.25, exclude_contaminated=False, exclude_prior_rows=False)
    count = len(color) // 4
    assert selection.num_rows == count
    np.testing.assert_array_equal(scores(selection), np.sort(color)[::-1][:count])


def test_num_tokens_is_a_budget(kept):
    assert kept(num_tokens=1000).num_tokens == 31 * 32


def test_min_score_keeps_everything_from_there(kept, color):
    selection = kept(min_score=1.0, exclude_contaminated=False, exclude_prior_rows=False)
    assert selection.num_rows == (color >= 1).sum() > 0
    assert scores(selection)[-1] >= 1


def test_min_score_that_nothing_reaches(kept):
    with pytest.raises(BudgetError, match="nothing reaches the threshold 99: lower `min_score`"):
        kept(min_score=99)


def test_threshold_of_another_selection(kept, finished):
    selection = kept(threshold_from=finished["run"])
    assert selection.num_rows == finished["selection"]["num_sequences"]
    assert selection.threshold == finished["selection"]["threshold"]


@pytest.mark.parametrize("exclude", [True, False])
def test_rows_of_the_prior(kept, exclude, finished):
    """The job's own `auto` leaves them out: they are more than 2 % of this pool."""
    tally = kept(tau=8, exclude_prior_rows=exclude).manifest.totals["tally"]
    assert (tally["fates"]["prior row"] > 0) == exclude
    assert finished["selection"]["fates"]["prior row"] > 0
    trained = 6000 // 32  # those that are contaminated too are not counted
    assert trained - tally["fates"]["contaminated"] <= tally["seen"][0] <= trained


def test_documents(kept, pool):
    selection = kept(tau=8, grain="documents")
    budget = int(pool.num_tokens / 8)
    assert budget - 200 < selection.num_tokens <= budget
    table = selection.to_arrow().read_all()
    places = set(zip(table["part"].to_pylist(), table["raw_row"].to_pylist(), strict=True))
    assert len(places) == table.num_rows
    assert len(set(table["id"].to_pylist())) == table.num_rows
    assert sum(table["num_tokens"].to_pylist()) == selection.num_tokens
    sea = table["source"].to_pylist().count("sea")
    assert sea > 0.8 * table.num_rows
    assert all(len(text.split()) >= 40 for text in table["text"].to_pylist())
    assert selection.provenance(0)["raw_file"].endswith(".parquet")
    assert verify(selection.uri, 4)["problems"] == []


def rows_by_source(selection):
    sources = selection.manifest.totals["tally"]["sources"]
    return {name: source["kept_rows"] for name, source in sources.items()}


def test_max_share_is_exact(kept):
    found = rows_by_source(kept(num_tokens=3200, max_share=0.29))
    assert sum(found.values()) == 100
    assert found["sea"] == 29
    assert max(found.values()) == 29


def test_shares_by_name_are_exact(kept):
    selection = kept(num_tokens=3200, max_share={"sea": 0.5}, min_share={"law": 0.21})
    found = rows_by_source(selection)
    assert (found["sea"], found["law"], sum(found.values())) == (50, 21, 100)
    verified = verify(selection.uri, 4)
    assert verified["problems"] == []
    assert verified["checked"]["cuts"] == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_share": 0.2}, "cannot keep 100 rows, `max_share` and the pool allow 80"),
        (
            {"min_share": {"law": 0.5}, "max_share": {"law": 0.4}},
            "asks for at least 50 of 100 rows, its `max_share` for at most 40",
        ),
        (
            {"min_share": {"poems": 0.1}},
            "no source 'poems' in the pool; it has code, food, law, sea",
        ),
    ],
)
def test_shares_that_cannot_hold(kept, settings, expected):
    with pytest.raises(BudgetError) as refused:
        kept(num_tokens=3200, **settings)
    assert expected in str(refused.value)


def test_more_than_may_be_chosen(kept):
    with pytest.raises(BudgetError, match="1,253 are left: keep less"):
        kept(tau=1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tau": 1}, "187 of the pool's 1,4"),
        ({"tau": 2, "max_share": 0.2}, "`max_share` and the pool allow"),
        ({"tau": 2, "min_share": {"sea": 0.9}}, "`min_share` of source 'sea' asks for"),
    ],
)
def test_what_the_tokens_tell_is_refused_before_a_model_is_trained(world, settings, expected):
    """A prior that no earlier job has trained, in the store that has the tokens."""
    listener = Quiet()
    prior = {"model": MODEL, "num_tokens": 6000, "seed": 77, **LEARNING}
    with pytest.raises(BudgetError) as refused:
        run_job(parse(world, prior=prior, selection=settings), listener)
    assert expected in str(refused.value)
    assert not [step for step, *_ in listener.steps if "train" in step]
