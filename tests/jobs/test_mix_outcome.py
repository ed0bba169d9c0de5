"""What a mix job says of itself: its progress, and what to look at first."""

from types import SimpleNamespace

from stillhouse.jobs.mix_outcome import _guessing, _one_sided, _unaffordable
from stillhouse.jobs.progress import Lines, rate
from stillhouse.mixing.evaluation import wilson
from stillhouse.pipelines.mix import _MixProgress
from stillhouse.pipelines.workers import STEP


def test_slow_and_fast_rates():
    assert rate(3, 10, "steps") == "0.3 steps/s"
    assert rate(345, 10, "steps") == "34.5 steps/s"
    assert rate(25_000, 10, "tokens") == "2.5 k tokens/s"
    assert rate(1, 0, "steps") == "0 steps/s"


def test_parts_have_their_name(capsys):
    lines = Lines()
    lines.begin("mix", 3, 1, "steps")
    lines.begin("score", 8, 0, "tokens")
    said = capsys.readouterr().err.splitlines()
    assert said == ["mix: 3 runs, 1 reused", "score: 8 parts, 0 reused"]


def test_runs_of_a_mix_advance_by_their_steps():
    told = []
    note = SimpleNamespace(note=lambda *_: None)
    runs = [SimpleNamespace(num_steps=10), SimpleNamespace(num_steps=30)]
    follower = _MixProgress(
        SimpleNamespace(listener=note), runs, lambda done, amount: told.append((done, amount))
    )
    for step in (5, 3, 10):  # a lost worker goes back to its checkpoint
        follower.hear(STEP, {"step": step, "run": 0, "of": 10})
    follower.hear("run", {"label": "ucb1", "seed": 0, "number": 0})
    follower.hear(STEP, {"step": 25, "run": 1, "of": 30})
    assert [amount for _, amount in told] == [5, 5, 0, 15]
    assert round(sum(done for done, _ in told), 2) == 1.5


def test_an_accuracy_that_a_guess_would_have_is_told():
    def run(label, correct, total=200, chance=0.5):
        interval = wilson(correct, total)
        test = {"accuracy": correct / total, "interval": interval, "chance": chance}
        return label, {"test": test}

    (said,) = _guessing("ucb1", [run("ucb1", 98), run("ucb1", 104), run("uniform", 190)])
    assert "accuracy of ucb1, 0.505, cannot be told from that of a guess" in said
    assert "0.500" in said
    assert _guessing("ucb1", [run("ucb1", 150), run("uniform", 100)]) == []
    free = "ucb1", {"test": {"accuracy": None, "interval": None, "chance": None}}
    assert _guessing("ucb1", [free]) == []


def test_weights_that_go_to_one_arm_are_told():
    def run(top):
        weights = {"web": 1 - top, "books": top}
        return "doremi", {"seed": 0, "average_weights": weights}

    (said,) = _one_sided([run(0.97), ("uniform", {"seed": 0})])
    assert "gives 97.0% of its weight to arm books: lower `policy.eta`" in said
    assert _one_sided([run(0.9)]) == []


def test_a_control_that_its_first_pass_leaves_one_step_is_told():
    def rule(label, num_steps):
        return SimpleNamespace(label=label, num_steps=num_steps)

    (said,) = _unaffordable([rule("static", 30), rule("uniform", 30), rule("static_alignment", 1)])
    assert said.startswith("the control static_alignment had one step")
    assert _unaffordable([rule("static", 1), rule("uniform", 1)]) == []
