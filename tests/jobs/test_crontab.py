"""The crontab line that `stillhouse schedule` prints, run by a shell as cron would."""

import fcntl
import os
import subprocess
import sys

import pytest
import yaml
from small import small_spec
from test_schedule import remote

from stillhouse.errors import SpecError
from stillhouse.jobs.schedule import Place, object_name, schedule
from stillhouse.spec import SelectSpec


def test_crontab_line_runs_as_it_stands(tmp_path, monkeypatch):
    """A shell runs the line; the spec has a mistake by then, so that no Ray starts."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "my spec.yaml"
    path.write_text(yaml.safe_dump(small_spec(tmp_path)))
    sets = ["name=100% of it", "selection.tau=4"]
    spec = SelectSpec.model_validate(small_spec(tmp_path, name="100% of it"))
    text = schedule("my spec.yaml", spec, sets, "@daily", "crontab", Place())
    comment, line = text.splitlines()
    name = object_name("my spec.yaml", spec)
    assert comment.startswith(f"# {name}: output and exit codes go to {name}.log")
    when, command = line.split(" ", 1)
    assert when == "@daily"
    assert "%" not in command.replace(r"\%", "")
    path.write_text("job: select\nselect: 1\n")
    bare = ["env", "-i", "HOME=/", "sh", "-c", command.replace(r"\%", "%")]  # as cron starts it
    done = subprocess.run(bare, check=False)
    assert done.returncode == 2
    log = folder / f"{name}.log"
    assert "unknown key `select`" in log.read_text()
    assert log.read_text().endswith("\nexit code 2\n")
    with open(folder / f"{name}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a run that is still at work has it
        assert subprocess.run(bare, check=False).returncode == 75
    assert log.read_text().endswith("\nexit code 75\n")
    assert log.read_text().count("unknown key") == 1


def test_a_crontab_line_takes_its_environment_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "night shift")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    program = tmp_path / "stillhouse"
    program.write_text('#!/bin/sh\necho "$AWS_PROFILE, $PATH, $AWS_SECRET_ACCESS_KEY."')
    program.chmod(0o755)
    text = schedule("s3://b/a.yaml", remote(), [], "@daily", "crontab", Place())
    command = text.splitlines()[1].removeprefix("@daily ").replace(r"\%", "%")
    subprocess.run(["env", "-i", "sh", "-c", command], check=True)
    log = tmp_path / f"{object_name('s3://b/a.yaml', remote())}.log"
    assert f"night shift, {os.environ['PATH']}, ." in log.read_text()
    assert "hidden" not in text


def test_crontab_line_for_a_running_cluster():
    place = Place("http://head:8265")
    text = schedule("s3://b/books.yaml", remote(), ["a=b"], "0 3 * * *", "crontab", place)
    assert text.splitlines()[1].startswith("0 3 * * * cd ")
    assert " submit s3://b/books.yaml --set a=b --address http://head:8265 --follow; " in text
    assert text.endswith(f">> {object_name('s3://b/books.yaml', remote())}.log 2>&1\n")


def test_a_line_break_is_refused():
    with pytest.raises(SpecError, match="cannot hold a line break"):
        schedule("a.yaml", remote(), ["name=a\nb"], "0 3 * * *", "crontab", Place())
