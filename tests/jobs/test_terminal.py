"""What data and users wrote is shown on a terminal as it is, and controls nothing."""

import io
import re

import pytest

import stillhouse.report.blocks as b
from stillhouse.jobs import summary
from stillhouse.jobs.progress import Bars, Lines, rate
from stillhouse.report.page import write
from stillhouse.report.terminal import Terminal, plain

ODD = "web [/2024] [bold]x[/] :smile: \x1b[2J\x1b]0;title\x07 \u202eback \x9b31m"
ESCAPED = r"web [/2024] [bold]x[/] :smile: \x1b[2J\x1b]0;title\x07 \u202eback \x9b31m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("Ünïcode: 日本語 👩‍🚀 עברית", "Ünïcode: 日本語 👩‍🚀 עברית"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        (ODD, ESCAPED),
        ("a\rb\x00\ud800", r"a\rb\x00\ud800"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert plain(text) == shown


PUBLISHED = {"name": "n", "version": 1, "again": None, "new": True, "selection": ODD}
RESULT = {
    "status": "done",
    "job": "select",
    "warnings": [ODD],
    "report": ODD,
    "artifacts": {"selection": ODD},
    "published": PUBLISHED,
}
STEP = {"state": ODD, "parts": 2, "done": 1, "reused": 0, "seconds": 1.0}
FAILED = {"step": ODD, "part": ODD, "node": ODD}
EARLIER = {"attempt": 1, "started": "t", "state": "failed", "error": ODD, "failed_at": FAILED}
RUN = {"run": "0" * 64, "name": ODD, "job": "select", "state": "failed", "updated": "t"}
RUN |= {"error": ODD, "failed_at": FAILED, "steps": {ODD: STEP}, "earlier": [EARLIER], "attempt": 2}
VERSION = {"version": 1, "selection": "0" * 64, "published": ODD, "again": None}
ARTIFACT = {"kind": "models", "fingerprint": "0" * 64, "bytes": 1, "age_s": 1, "referred_by": [ODD]}
STORE = {"store": ODD, "runs": [RUN], "names": [{"name": "n", "versions": [VERSION]}]}
STORE |= {"artifacts": [ARTIFACT]}
PLANNED = {"parts": 1, "reused": 0, "tokens": 1, "flops": 1, "seconds": 1}
PRUNED = {"dry": True, "unreachable": {ODD: {"objects": 1, "bytes": 2}}, "removed": {}}
CLUSTER = {"address": ODD, "state": "FAILED", "error": ODD}
JOB = {"job_id": "0" * 64 + "-1", "why_not": ODD, "cluster": CLUSTER, "run": None}


@pytest.mark.parametrize(
    ("show", "found"),
    [
        (summary.show_status, RUN),
        (summary.show_status, STORE),
        (summary.show_status, {"versions": [VERSION], "name": ODD}),
        (summary.show_plan, {"job": "select", "steps": {ODD: PLANNED}, "notes": [ODD]}),
        (summary.show_published, {"store": ODD} | PUBLISHED),
        (summary.show_pruned, PRUNED | {"store": ODD, "live_runs": [ODD]}),
        (summary.show_verification, {"checked": {ODD: 1}, "problems": [ODD]}),
        (summary.show_job, JOB),
        (summary.show_job, JOB | {"run": RUN | {"was": EARLIER}}),
        (summary.show_job, JOB | {"cluster": None}),
        (lambda found: summary.show_changes(found, [ODD]), RUN),
    ],
)
def test_every_table_and_line(show, found, capsys, monkeypatch):
    """Wide enough that nothing wraps: brackets stay, no control character is passed on."""
    monkeypatch.setenv("COLUMNS", "2000")
    show(found)
    out = capsys.readouterr().out
    assert ESCAPED in out
    assert not set("\x1b\x07\x9b\u202e") & set(out)


def test_a_result(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "2000")
    columns = {ODD: "text", "kept": "percent", "bars": "bars", "loss": "decimals3 wide"}
    rows = [[ODD, 0.5, [0.5], [1.5, 0.25]], ["web", None, [0.1], 2.0], ["x", 0.1, [0.1], 3.0]]
    blocks = [
        b.Text(f"**{ODD}** and `{ODD}`", terminal=True),
        b.Facts([b.Fact(ODD, ODD, ODD, main=True)], terminal=True),
        b.Group([b.Table(columns, rows, main=ODD, shown=2, terminal=True)]),
        b.Text("for the page alone"),
    ]
    sections = [b.Section("one", ODD, blocks)]
    numbers = RESULT | {"run": str(tmp_path)}
    summary.show_result(write(b.Result("select", "t", "2026-01-01T00:00:00", numbers, sections)))
    out = capsys.readouterr().out
    assert out.count(ESCAPED) == 12
    assert not set("\x1b\x07\x9b\u202e") & set(out)
    assert re.search(r"50.0\s%\s*│\s*1.500 ± 0.250", out) and "and 1 more" in out
    assert "bars" not in out and "page alone" not in out and "**" not in out
    assert f"next:   stillhouse verify {tmp_path}" in out


def test_a_result_whose_report_is_gone(capsys, tmp_path):
    summary.show_result(RESULT | {"run": str(tmp_path), "status": "nothing_to_do"})
    out = capsys.readouterr().out
    assert "nothing to do" in out and "report.json" in out and "next:" in out


def test_progress(capsys):
    def tell(shown):
        shown.begin(ODD, 2, 0, "tokens")
        shown.advance(ODD, 1, 5)
        shown.end(ODD, 1.0)
        shown.note("waiting", {"message": ODD})
        shown.close()

    tell(Lines())
    out = capsys.readouterr().err
    assert out.count(ESCAPED) == 3 and "\x1b" not in out
    Lines().begin("mix", 3, 1, "steps")
    assert capsys.readouterr().err == "mix: 3 runs, 1 reused\n"
    screen, terminal = io.StringIO(), Terminal()
    terminal.file, terminal.width = screen, 2000
    tell(Bars(terminal))
    assert screen.getvalue().count(ESCAPED) >= 2
    assert "\x07" not in screen.getvalue()


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(0, "0"), (0.12, "0.012"), (35, "3.5"), (999, "99.9"), (9996, "1.0 k"), (2e10, "2.0 G")],
)
def test_rates(amount, shown):
    assert rate(amount, 10.0, "steps") == f"{shown} steps/s"
    assert rate(1, 0, "steps") == "0 steps/s"
