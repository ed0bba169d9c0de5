from dataclasses import replace

import numpy as np
import pytest

from stillhouse.report.data import Curve
from stillhouse.report.heat import heat_plot
from stillhouse.report.mix_data import (
    ArmRow,
    Heat,
    MixReport,
    PolicyRow,
    SeedRow,
    from_json,
    to_json,
)
from stillhouse.report.render import render_mix


def report(num_arms=300, hostile=""):
    rng = np.random.default_rng(0)
    steps = np.linspace(0, 1, 60)
    good = np.array([1 + 20 * (i % 29 == 0) * steps for i in range(num_arms)])
    shares = good * rng.uniform(0.5, 1.5, good.shape)
    shares = shares / shares.sum(0)
    order = np.argsort(-shares.sum(1))
    names = [f"auxiliary_task_{i:03}{hostile}" for i in order]

    def runs(level):
        return [
            SeedRow(s, level + 0.02 * s, 0.6 - level / 9, (0.4, 0.6), 3600, 300, 200, 61.0)
            for s in range(3)
        ]

    def curve(name, level):
        return [Curve(name, s, [(x, level + 2 / x**0.5) for x in (20, 100, 300)]) for s in range(3)]

    heats = [Heat("ucb1", names, shares[order].tolist(), 300)]
    return MixReport(
        title=f"A mix{hostile}",
        created="2026-11-21T09:00:00+00:00",
        run_uri="/store/runs/a",
        main="ucb1",
        num_arms=num_arms,
        num_shots=32,
        test_rows=300,
        policies=[PolicyRow("ucb1", runs(1.0)), PolicyRow("uniform_with_target_pass", runs(0.9))],
        heats=heats,
        curves=curve("ucb1", 1.0) + curve("uniform_with_target_pass", 0.9),
        passes=curve("ucb1", 1.0),
        effective=curve("ucb1", 40.0),
        arms=[ArmRow(n, 400, 100 - i % 90, 0.01, 0.3, 0.1) for i, n in enumerate(names)],
        cumulative=[
            Curve(n, 0, [(1.0, 1.0), (300.0, 100.0 + 30 * i)]) for i, n in enumerate(names[:3])
        ],
        rows={"examples": 100_000, "truncated": 12},
        skipped={"gone": "no files"},
        warnings=["12 rows were cut"],
    )


@pytest.mark.parametrize("num_arms", [3, 86, 300])
def test_the_page_shows_arms_however_many(num_arms):
    data = report(num_arms)
    page = render_mix(data)
    assert page.count("data:image/png;base64,") == 1 and "<script" not in page
    plot = str(heat_plot(data.heats[0]))
    # rows of 16 px and of 10 px are labelled each, of 4 px every third
    assert plot.count("<bdi") == {3: 3, 86: 86, 300: 100}[num_arms]
    assert f"uniform: {1 / num_arms:.1%}" in plot
    assert "The lowest loss has <em>uniform with target pass</em>" in page


def test_the_data_come_back():
    data = report(5)
    assert from_json(to_json(data)) == data


def test_hostile_names_stay_text():
    page = render_mix(report(4, hostile="<script>alert(1)</script>"))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_policy_is_marked_and_what_a_guess_is_worth_is_said():
    data = replace(report(5), chance=0.5, spec_yaml="job: mix", artifacts=[("run", "/store/a")])
    page = render_mix(data)
    assert page.count('<tr class=main><th scope="row">ucb1</th>') == 1 + 3  # and its three seeds
    assert page.count("<tr class=main>") == 4
    assert "(a guess: 0.500)" in page
    assert '<p class="house">\n    <svg' in page  # the logo
    assert "<pre" in page and "job: mix" in page
    assert "a guess" not in render_mix(report(5)).lower()
