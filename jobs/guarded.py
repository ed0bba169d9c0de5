"""Around every verb: errors become a line or two on stderr and an exit code, never a traceback."""

import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

import typer

from stillhouse.errors import MissingExtraError, StillhouseError

_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)
"""Where results go while stdout is kept for them; None: to stdout."""


def guarded(action: Callable[[], int | None], as_json: bool, debug: bool) -> None:
    """Run a verb and end with its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _stdout_for_results(as_json), extras_named():
            code = action() or 0
        sys.stdout.flush()
    except StillhouseError as error:
        _complain(error, str(error), as_json, debug)
        code = error.exit_code
    except (KeyboardInterrupt, SystemExit):  # Ray makes a SystemExit of SIGTERM
        typer.secho("stopped; run the same command again to go on", fg="yellow", err=True)
        if as_json:
            print_json({"status": "stopped"})
        code = 4
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        if debug:
            raise
        from stillhouse.jobs.run import failure_text

        hint = "run again with --debug for the traceback"
        _complain(error, f"{failure_text(error)} ({hint})", as_json, debug)
        code = 1
    raise typer.Exit(code)


@contextmanager
def extras_named() -> Generator[None]:
    """A module that an extra would bring is missing: the error names the extra.

    Raises:
        MissingExtraError: instead of an ImportError.
    """
    try:
        yield
    except ImportError as error:
        named = MissingExtraError.of(error)
        if named is None:
            raise
        raise named from error


@contextmanager
def _stdout_for_results(as_json: bool) -> Generator[None]:
    """With `--json`, whatever else is printed meanwhile, by Ray's threads too, goes to stderr."""
    if not as_json:
        yield
        return
    kept = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(kept)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader is gone, as in `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _complain(error: Exception, message: str, as_json: bool, debug: bool) -> None:
    from stillhouse.report.terminal import plain

    if debug:
        traceback.print_exception(error)
    typer.secho(f"error: {plain(message)}", fg="red", err=True)
    if as_json:
        print(json.dumps({"status": "error", "error": message}))


def print_json(result: dict[str, Any]) -> None:
    """What `--json` prints: one object."""
    print(json.dumps(result, indent=1), file=_RESULTS.get())
