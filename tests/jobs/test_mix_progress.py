"""How a mix job tells of its progress."""

from types import SimpleNamespace

from stillhouse.jobs.progress import Lines, rate
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
    runs = [SimpleNamespace(rule=SimpleNamespace(num_steps=n)) for n in (10, 30)]
    follower = _MixProgress(
        SimpleNamespace(listener=note), runs, lambda done, amount: told.append((done, amount))
    )
    for step in (5, 3, 10):  # a lost worker goes back to its checkpoint
        follower.take(STEP, {"step": step, "run": 0, "in_run": step})
    follower.take("run", {"label": "ucb1", "seed": 0, "number": 0})
    follower.take(STEP, {"step": 25, "run": 1, "in_run": 15})
    assert [amount for _, amount in told] == [5, 5, 0, 15]
    assert round(sum(done for done, _ in told), 2) == 1.5
