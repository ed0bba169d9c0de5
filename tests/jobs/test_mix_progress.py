"""How a mix job tells of its progress."""

from types import SimpleNamespace

from stillhouse.jobs.progress import Lines, rate
from stillhouse.pipelines.mix import _Progress
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
    told, noted = [], []
    ctx = SimpleNamespace(listener=SimpleNamespace(note=lambda *of: noted.append(of)))
    progress = _Progress(ctx, lambda done, amount: told.append((done, amount)))
    for step in (5, 3, 10):  # a lost worker goes back to its checkpoint
        progress.take(STEP, {"step": step, "done": 0.0999 * step})
    progress.take("run", {"label": "ucb1", "seed": 0, "step": 0, "done": 1})
    progress.take(STEP, {"step": 25, "done": 1.5})
    assert [amount for _, amount in told] == [5, 5, 0, 15]
    assert round(sum(done for done, _ in told), 2) == 1.5 and len(noted) == 1
