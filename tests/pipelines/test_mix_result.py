"""The report of a mix job: its warnings, and what was drawn."""

from types import SimpleNamespace

import pytest

from stillhouse.mixing.batches import wilson
from stillhouse.mixing.decisions import Decision
from stillhouse.pipelines.mix_result import (
    arms_section,
    drawn_section,
    guessing,
    one_sided,
    policies_section,
    unaffordable,
)


def test_an_accuracy_that_a_guess_would_have_is_told():
    def run(correct, total=200, chance=0.5):
        interval = wilson(correct, total)
        return {"accuracy": correct / total, "interval": interval, "chance": chance}

    (said,) = guessing("ucb1", [run(98), run(104)])
    assert "accuracy of ucb1, 0.505, cannot be told from that of a guess" in said.title
    assert "0.500" in said.title
    assert guessing("ucb1", [run(150)]) == []
    assert guessing("ucb1", [{"accuracy": None, "interval": None, "chance": None}]) == []


def test_weights_that_go_to_one_arm_are_told():
    def run(top):
        return {"seed": 0, "average_weights": {"web": 1 - top, "books": top}}

    (said,) = one_sided({"doremi": [run(0.97)], "uniform": [{"seed": 0}]})
    assert "gives 97.0% of its weight to arm books" in said.title and "policy.eta" in said.detail
    assert one_sided({"doremi": [run(0.9)]}) == []


def test_a_baseline_that_its_first_pass_leaves_one_step_is_told():
    def rule(label, num_steps):
        return SimpleNamespace(label=label, num_steps=num_steps)

    (said,) = unaffordable([rule("static", 30), rule("uniform", 30), rule("static_alignment", 1)])
    assert said.title.startswith("The baseline static_alignment had one step")
    assert unaffordable([rule("static", 1), rule("uniform", 1)]) == []


def test_means_and_deviations_are_over_the_seeds():
    def run(seed, nll, accuracy):
        test = {"nll": nll, "accuracy": accuracy, "interval": (0.4, 0.6)}
        sizes = {"gradient_passes": 100 + seed, "num_steps": 30, "best_step": 20, "seconds": 2.0}
        return {"seed": seed, "test": test, **sizes}

    runs = {"ucb1": [run(0, 1.0, 0.5), run(1, 3.0, 0.7)], "target_only": [run(0, 2.0, None)]}
    _, table, folded = policies_section("ucb1", runs)
    name, seeds, loss, accuracy, passes, seconds = table.rows[0]
    assert (name, seeds, passes, seconds) == ("ucb1", 2, 100.5, 2.0)
    assert loss == pytest.approx([2.0, 2**0.5]) and accuracy == pytest.approx([0.6, 0.02**0.5])
    assert table.rows[1][2:4] == [[2.0, None], None] and table.main == "ucb1"
    assert folded.blocks[0].rows[1] == ["ucb1", 1, 3.0, 0.7, 0.4, 0.6, 101, "20 of 30"]


def decisions(*arms, probabilities=None):
    """Two draws a step, a reward for each."""
    return [
        Decision(i // 2, i % 2, 0.5, arm, reward=float(i), probabilities=probabilities)
        for i, arm in enumerate(arms)
    ]


def test_draws_and_rewards_are_those_of_the_log():
    arms = [SimpleNamespace(name=name, num_rows=9) for name in ("a", "b", "c")]
    made = SimpleNamespace(arms=SimpleNamespace(arms=arms))
    log = decisions(1, 1, 1, 0, 1, 0)  # of two rewards in one step the last one counts
    (table,) = arms_section([log], made)
    assert [row[:3] for row in table.rows] == [["b", 9, 4], ["a", 9, 2], ["c", 9, 0]]
    assert [row[3] for row in table.rows] == pytest.approx([4 / 6, 2 / 6, 0])
    assert table.rows[0][4] == pytest.approx([(1 + 2 + 4) / 3, (7 / 3) ** 0.5])
    assert table.rows[2][4] is None
    heat, charts = drawn_section("ucb1", {"ucb1": [log]}, ["a", "b", "c"])
    assert heat.names == ["b", "a", "c"] and heat.num_steps == 3
    assert heat.shares == [[1.0, 0.5, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]
    cumulative, effective = charts.blocks
    assert cumulative.curves["b"] == [[(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]]
    assert cumulative.curves["c"] == [[(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)]]
    assert [x for x, _ in effective.curves["ucb1"][0]] == [1, 2, 3]
    assert [y for _, y in effective.curves["ucb1"][0]] == pytest.approx([1, 2, 2])


def test_a_logged_distribution_stands_before_the_draws():
    log = decisions(0, 0, 0, 0, probabilities=[0.75, 0.25])
    heat, _ = drawn_section("exp3", {"exp3": [log]}, ["a", "b"])
    assert heat.shares == [[0.75, 0.75], [0.25, 0.25]]
