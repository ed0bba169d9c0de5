"""The page of a training: what it says, draws and marks."""

import re
from dataclasses import replace

import pytest

from stillhouse.report.data import HealthWarning, StepCost
from stillhouse.report.render import render_training
from stillhouse.report.training import (
    DataRow,
    SourceCurve,
    Start,
    TrainingReport,
    from_json,
    to_json,
)

POINTS = [(1000 * i, 6.0 - 0.3 * i) for i in range(1, 11)]


@pytest.fixture
def report():
    return TrainingReport(
        title="Books <small>",
        created="2026-11-21T09:00:00+00:00",
        run_uri="s3://b/store/runs/0",
        num_parameters=1_234_000,
        num_tokens=10_000,
        num_steps=100,
        global_batch=4,
        learning_rate=4e-3,
        sequence_length=25,
        heldout=POINTS,
        loss=[(tokens, loss + 0.1) for tokens, loss in POINTS],
        tokens_per_s=[(tokens, 2000.0) for tokens, _ in POINTS],
        data_wait=[(tokens, 0.01) for tokens, _ in POINTS],
        grad_norm=[(tokens, 1.0) for tokens, _ in POINTS],
        mean_tokens_per_s=2000.0,
        data_wait_share=0.01,
        mfu=None,
        starts=[Start(0, 4), Start(2500, 4), Start(7500, 2)],
        sources=[SourceCurve("sea", POINTS, POINTS), SourceCurve("<law>", [], POINTS)],
        data=[DataRow("pool", 1.0, 800, 0.5)],
        order_sha256="ab" * 32,
        costs=[StepCost("train", 10_000, 1e9, 5.0, None, False)],
        warnings=[HealthWarning("It waited.", "The store is slow.")],
        spec_yaml="job: train\n",
    )


def test_stored_and_read_back(report):
    assert from_json(to_json(report)) == report


def test_what_the_page_says(report):
    page = render_training(report)
    text = re.sub(r"<[^>]+>", " ", page)
    for said in ("3.000 nats", "1.23", "2,000", "begun again 2 times", "It waited.", "ab" * 32):
        assert said in re.sub(r"\s+", " ", text), said
    assert "Books &lt;small&gt;" in page and "&lt;law&gt;" in page and "<law>" not in page
    assert "<script" not in page and "http-equiv" in page


def test_restarts_are_marks_on_every_curve(report):
    page = render_training(report)
    assert page.count('<path class="restart" d="M250 0L250 1000"/>') == 4
    assert page.count('<path class="restart" d="M750 0L750 1000"/>') == 4
    calm = replace(report, starts=report.starts[:1])
    assert 'class="restart"' not in render_training(calm)


def test_without_a_held_out_or_sources(report):
    bare = replace(report, heldout=[], sources=[], data=[], costs=[], warnings=[])
    page = render_training(bare)
    assert "held-out" not in page and "As trained on" in page


def test_one_step_is_drawn_too(report):
    one = replace(
        report,
        num_tokens=100,
        heldout=[(100, 5.0)],
        loss=[(100, 5.0)],
        tokens_per_s=[(100, 1.0)],
        data_wait=[(100, 0.0)],
        sources=[],
        starts=[Start(0, 1)],
    )
    assert "5.000" in render_training(one)


def sources(count, heldout):
    """Sources by size, the first `heldout` of them with losses of their own on held-out text."""
    names = [f"source {i:02d}" for i in range(count)]
    return [SourceCurve(n, POINTS if i < heldout else [], POINTS) for i, n in enumerate(names)]


def figure(page, caption):
    """The figure with this caption, and its caption in full."""
    found = [
        f for f in page.split("<figure>") if f"<figcaption>{caption}" in re.sub(r"\s+", " ", f)
    ]
    assert len(found) == 1
    return found[0].split("</figure>")[0]


def test_as_many_sources_have_names_as_can_be_told_apart(report):
    page = render_training(replace(report, sources=sources(31, 31)))
    drawn = figure(page, "Each source, held out; the 6 largest of 31 have their names")
    lines = re.findall(r'<path class="line (\w+)" d="M', drawn.split("</svg>")[0])
    assert lines.count("faint") == 25
    named = [style for style in lines if style != "faint"]
    assert len(set(named)) == len(named) == 6
    labels = re.findall(r'class="end \w+" style="top:([\d.-]+)%"', drawn)
    assert len(labels) == 6 and all(0 <= float(place) <= 100 for place in labels)
    assert all(f"source {i:02d}" in page.split('id="speed"')[0] for i in range(31))
    assert "19 more sources" in page


def test_sources_are_compared_by_one_kind_of_loss(report):
    """One source that happens to be held out says nothing of the others."""
    for held, said in ((0, "as trained on"), (1, "as trained on"), (2, "held out")):
        drawn = figure(
            render_training(replace(report, sources=sources(5, held))), f"Each source, {said}"
        )
        assert drawn.count('<path class="line ') - drawn.count("M0 2H20") == (
            held if held > 1 else 5
        )
    assert "Each source" not in render_training(replace(report, sources=sources(1, 1)))


def test_costs_without_numbers_have_no_columns(report):
    costs = [StepCost("scan", 0, 0.0, 3.0, None, False), StepCost("train", 0, 0.0, 0.0, None, True)]
    cost = render_training(replace(report, costs=costs)).split('id="cost"')[1].split("</table>")[0]
    assert re.findall(r"<th [^>]*>(?:<span[^>]*>)?([^<]*)", cost.split("<tbody>")[0]) == [
        "Step",
        "time",
    ]
    assert not re.search(r">0<|>0\.0", cost)
    some = [costs[0], StepCost("train", 10, 1e9, 5.0, None, False)]
    cost = render_training(replace(report, costs=some)).split('id="cost"')[1].split("</table>")[0]
    assert ">10<" in cost and "1.00\u202fGFLOP" in cost and cost.count(">–<") == 2
