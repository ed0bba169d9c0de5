"""The result and report of a training, from a manifest's numbers written out here."""

import re
from functools import partial
from types import SimpleNamespace

import pytest

from stillhouse.pipelines.context import Context, StepWork
from stillhouse.pipelines.train_result import train_result
from stillhouse.report.page import render
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store
from stillhouse.training.order import Rows, SampleOrder
from stillhouse.training.schedule import Schedule
from stillhouse.training.spec import TrainSpec

SPEC = TrainSpec.model_validate(
    {
        "job": "train",
        "name": "Books <small>",
        "store": "/store",
        "data": {"path": "/x/*.parquet"},
        "tokenizer": {"path": "/t"},
        "model": {"hidden_size": 32, "num_layers": 1},
    }
)
STARTS = [{"step": 0, "workers": 4}, {"step": 25, "workers": 4}, {"step": 75, "workers": 2}]


def loss(step):
    return 6.0 - 0.3 * step


FIXED = [("pool <law>", Rows([800], 3.0)), ("b", Rows([50], 1.0))]


def result_of(sources=0, heldout=0, work=None, measured=None, sets=FIXED, **changes):
    """10,000 tokens in 100 steps, restarted twice; sources by size, the first ones held out."""
    names = [f"source {n:02d} <law>" for n in range(sources)]

    def losses(step, shown):
        return {name: {"nll": loss(step), "num_tokens": 99 - n} for n, name in enumerate(shown)}

    measured = {
        "tokens_per_second": 2000.0,
        "data_wait_share": 0.01,
        "mfu": None,
        "halved_to": None,
        "starts": STARTS,
    } | (measured or {})
    totals = {
        "num_parameters": 1_234_000,
        "num_tokens": 10_000,
        "num_steps": 100,
        "final_loss": 3.1,
        "late_fall": None,
        "curve": [[1000 * n, loss(n)] for n in range(1, 11)],
        "points": [
            {
                "tokens": 1000 * n,
                "loss": loss(n) + 0.1,
                "tokens_per_s": 2e3,
                "data_wait_share": 0.01,
            }
            for n in range(1, 11)
        ],
        "evaluations": [
            {
                "tokens": 1000 * n,
                "heldout": losses(n, names[:heldout]),
                "trained": losses(n, names),
                "halves": losses(n, ["validation", "test"]) if heldout else {},
            }
            for n in range(1, 11)
        ],
        "order_sha256": "ab" * 32,
        "measured": measured,
    } | changes
    made = SimpleNamespace(
        model=SimpleNamespace(totals=totals, fingerprint="0" * 64),
        task=SimpleNamespace(
            mask_id=None,
            settings=SimpleNamespace(batch_size=4, peak_rate=4e-3),
            sequence_length=25,
            step_units=100,
            num_steps=100,
            label="x",
            data=[
                SimpleNamespace(
                    name=name,
                    num_rows=sum(one.part_rows),
                    share=SimpleNamespace(limit=one.max_epochs),
                )
                for name, one in sets
            ],
            order=lambda: SampleOrder(
                [one for _, one in sets],
                global_batch=4,
                seed=0,
                lanes=2,
                window=10,
                num_steps=100,
            ),
        ),
        tokenizer=SimpleNamespace(path="/store/tokenizers/t"),
        packed=[],
        num_dead=0,
    )
    ctx = Context(Store("/store"), ComputeSettings(), SimpleNamespace(), work=work or {})
    return train_result(ctx, SPEC, made, "/store/runs/0")


def captions(result):
    return [block.caption for block in result.find("learning", "curves")]


def test_what_the_page_says():
    page = render(result_of(sources=2, heldout=1))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for said in ("3.000 nats", "1.23", "2,000", "restarted 2 times", "ab" * 32, "No warnings."):
        assert said in text, said
    assert "Books &lt;small&gt;" in page and "&lt;law&gt;" in page and "<law>" not in page


def test_numbers_shown_are_the_numbers_computed():
    result = result_of(sources=3, heldout=1)
    (data,) = result.find("data", "table")
    # 400 sequences drawn, three quarters of them from 800 rows, to a sequence or two
    near = partial(pytest.approx, rel=0.1)
    assert data.rows == [
        ["pool <law>", 0.75, near(0.75), 800, near(0.375)],
        ["b", 0.25, near(0.25), 50, near(2.0)],
    ]
    assert [one["name"] for one in result.numbers["train"]["data"]] == ["pool <law>", "b"]
    assert result.find("data", "curves") == []
    (starts,) = result.find("speed", "table")
    assert starts.rows == [[0, 4], [2500, 4], [7500, 2]]
    charts = result.find("learning", "curves") + result.find("speed", "curves")
    assert [chart.marks for chart in charts] == [[2500, 7500]] * 4
    (last,) = result.find("learning", "table")
    # held out, in bits per byte (not measured here), and as trained on
    assert last.rows[0][1:] == [3.0, None, 3.0] and last.rows[2][1:] == [None, None, 3.0]


def test_shares_that_change_are_drawn_and_counted():
    """Three to one, and after 80 of 100 steps of 4 sequences none: 240 of 400."""
    changing = ("a", Rows([800], Schedule(((0.0, 3.0), (0.8, 0.0)))))
    result = result_of(sets=[changing, ("b", Rows([50]))])
    (data,) = result.find("data", "table")
    assert [*data.columns] == ["Data", "share asked for", "drawn", "sequences", "epochs"]
    assert data.rows == [["a", 0.6, 0.6, 800, 0.3], ["b", 0.4, 0.4, 50, 3.2]]
    (chart,) = result.find("data", "curves")
    # a draw of both lanes is 50 tokens: 10,000 in all, the last before 80 % begins at 7,950
    assert chart.curves["a"] == [[(0, 75), (7950, 75), (8000, 0), (9950, 0)]]
    assert chart.curves["b"] == [[(0, 25), (7950, 25), (8000, 100), (9950, 100)]]
    assert "What the batches were drawn from" in render(result)
    exhausted = result_of(sets=[("a", Rows([800])), ("b", Rows([50], 1.0, max_epochs=2))])
    (data,) = exhausted.find("data", "table")
    assert data.rows == [["a", 0.5, 0.75, 800, 0.375], ["b", 0.5, 0.25, 50, 2.0]]
    page = re.sub(r"<[^>]+>", "", render(exhausted))
    assert "b was exhausted at step 50 of 100, after 2 epochs" in page
    assert "was exhausted" not in render(result)


def test_one_data_set_has_no_shares():
    (data,) = result_of(sets=[("a", Rows([800]))]).find("data", "table")
    assert (data.columns.keys(), data.rows) == ({"Data", "sequences", "epochs"}, [["a", 800, 0.5]])


def test_without_a_held_out_or_sources():
    result = result_of(curve=[], measured={"starts": STARTS[:1]})
    assert captions(result) == ["As trained on"] and result.find("learning", "table") == []
    assert result.numbers["train"]["heldout_nll"] is None
    assert result.numbers["train"]["heldout_halves"] is None
    assert "held-out text" not in render(result) and "restarted" not in render(result)


def test_one_step_is_drawn_too():
    point = {"tokens": 100, "loss": 5.0, "tokens_per_s": 1.0, "data_wait_share": 0.0}
    assert "5.000" in render(result_of(num_tokens=100, curve=[[100, 5.0]], points=[point]))


def test_sources_are_compared_by_one_kind_of_loss():
    """One source that happens to be held out says nothing of the others."""
    for held, said, count in ((0, "as trained on", 5), (1, "as trained on", 5), (2, "held out", 2)):
        result = result_of(sources=5, heldout=held)
        assert captions(result)[1] == f"Each source, {said}"
        assert len(result.find("learning", "curves")[1].curves) == count
    assert len(captions(result_of(sources=1, heldout=1))) == 1
    many = result_of(sources=31, heldout=31)
    assert captions(many)[1] == "Each source, held out; the 6 largest of 31 have their names"
    assert next(iter(many.find("learning", "curves")[1].curves)) == "source 00 <law>"


def test_what_is_warned_of():
    found = result_of(measured={"data_wait_share": 0.06, "halved_to": 2}).numbers["warnings"]
    assert found == [
        "The training waited for data 6% of its time.",
        "The micro-batch was halved to 2 sequences.",
    ]


def test_costs_without_numbers_have_no_columns():
    idle = StepWork(parts=2, reused=2)
    (cost,) = result_of(work={"scan": StepWork(parts=1, seconds=3.0), "pack": idle}).find(
        "cost", "table"
    )
    assert [*cost.columns] == ["Step", "tasks", "reused", "time"]
    assert cost.rows == [["scan", 1, None, 3.0], ["pack", 2, 2, None]]
    assert cost.totals == [["Everything", 3, 2, None], ["This run", 1, None, 3.0]]
    trained = StepWork(parts=1, tokens=10, flops=1e9, seconds=5.0, device_seconds=4.0)
    result = result_of(work={"pack": idle, "train": trained})
    (cost,) = result.find("cost", "table")
    assert cost.rows[1] == ["train", [None, 1.0], 1, None, 10, 1e9, 5.0, 4.0]
    assert result.numbers["cost"] == {
        "flops": {"train": 1e9},
        "device_seconds": {"pack": 0.0, "train": 4.0},
    }
