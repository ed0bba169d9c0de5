"""The process of a verb: errors become exit codes, and `run` works under a parent that watches it.

Ray ends a driver at once, with exit code 1 and no message, when the raylet it is connected to
dies; the kernel kills it when memory is short. The parent outlives both: it explains what
happened, marks the run as stopped and exits with code 4.
"""

import ctypes
import inspect
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import wraps
from typing import Annotated, Any, NamedTuple

import typer

from stillhouse.errors import MissingExtraError, StillhouseError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, only that.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPEAT_S = 1.0
_PR_SET_PDEATHSIG = 1
_to_parent: int | None = None


class VerbOutput(NamedTuple):
    """What a verb returns: the object of `--json`, what shows it to a person, the exit code."""

    result: dict[str, Any]
    show: Callable[[dict[str, Any]], object]
    exit_code: int = 0


def verb(function: Callable[..., VerbOutput]) -> Callable[..., None]:
    """Give a verb `--json` and `--debug`, print its output and exit with its code.

    With `--json` everything else that is printed meanwhile, by Ray's threads too, goes to stderr.
    An error is one or two lines on stderr, never a traceback.
    """
    signature = inspect.signature(function)
    known = signature.parameters
    extra = {"as_json": AsJson, "debug": Debug}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in extra.items()
        if name not in known
    ]

    @wraps(function)
    def command(as_json: bool, debug: bool, **arguments: Any) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        arguments |= {"as_json": as_json} if "as_json" in known else {}
        try:
            with extra_named():
                with redirect_stdout(sys.stderr) if as_json else nullcontext():
                    output = function(**arguments)
                if as_json:
                    print(json.dumps(output.result, indent=1))
                else:
                    output.show(output.result)
            sys.stdout.flush()
            code = output.exit_code
        except StillhouseError as error:
            _print_error(error, str(error), as_json, debug)
            code = error.exit_code
        except (KeyboardInterrupt, SystemExit):  # Ray turns SIGTERM into a SystemExit
            typer.secho("stopped; run the same command again to go on", fg="yellow", err=True)
            if as_json:
                print(json.dumps({"status": "stopped"}))
            code = 4
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _stdout_closed():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            if debug:
                raise
            hint = "run again with --debug for the traceback"
            _print_error(error, f"{failure_text(error)} ({hint})", as_json, debug)
            code = 1
        raise typer.Exit(code)

    parameters = [*known.values(), *added]
    command.__signature__ = signature.replace(  # pyright: ignore[reportAttributeAccessIssue]
        parameters=parameters, return_annotation=None
    )
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


@contextmanager
def extra_named() -> Generator[None]:
    """Turn the ImportError of a module that an extra brings into one that names the extra.

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


def failure_text(error: BaseException) -> str:
    """What `status` shows of an error: our own in full, of others the line that matters.

    A worker's exception carries its whole traceback, which ends with the exception itself.
    """
    if isinstance(error, StillhouseError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "stopped by a signal"
    lines = str(error).strip().splitlines()
    if lines and lines[0].startswith("Traceback"):
        return lines[-1][:300]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _stdout_closed() -> bool:
    """Whether stdout is a pipe whose reader is gone, as in `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_error(error: Exception, message: str, as_json: bool, debug: bool) -> None:
    from stillhouse.report.terminal import plain

    if debug:
        traceback.print_exception(error)
    typer.secho(f"error: {plain(message)}", fg="red", err=True)
    tell_parent(error=message)
    if as_json:
        details = error.details if isinstance(error, StillhouseError) else {}
        print(json.dumps({"status": "error", "error": message, **details}))


def supervise() -> None:
    """Fork: return in the child; the parent waits for it and exits as it did.

    To be called before any thread is started. A signal reaches the child once, whether it was
    sent to the parent or to the process group; a killed parent takes the child with it.
    """
    global _to_parent
    sys.stdout.flush()
    sys.stderr.flush()
    parent, (receiving, sending) = os.getpid(), os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)  # until the handlers are set
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(receiving)
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored after `nohup` or `&`
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(4)
        _to_parent = sending
        return
    os.close(sending)
    forwarded: dict[int, float] = {}

    def forward(number: int, _: object) -> None:
        last, forwarded[number] = forwarded.get(number, -_REPEAT_S), time.monotonic()
        if forwarded[number] - last >= _REPEAT_S:  # `timeout` signals both us and our group
            os.kill(child, number)

    for number in _FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    messages: dict[str, Any] = {}
    runs: list[str] = []
    with open(receiving, "rb") as pipe:
        for line in pipe:
            messages |= json.loads(line)
            runs += [messages.pop("run")] if "run" in messages else []
    _, status = os.waitpid(child, 0)
    stopped_by = next(iter(forwarded), None)
    code = messages.get("ended")
    if code is None:
        code, messages["error"] = 4, _why(stopped_by, os.waitstatus_to_exitcode(status))
        _mark_stopped(messages, runs)
    if code and messages.get("told") and stopped_by != signal.SIGINT:
        from stillhouse.jobs.webhook import post_failure

        post_failure(messages["told"], code, messages.get("error"), runs[-1] if runs else None)
    os._exit(code)


def tell_parent(**content: Any) -> None:
    """Send to the parent, if there is one.

    `told` (`jobs.webhook`) of a job; `run`, `store` and `options` when a run begins; `error` and
    `ended`, the exit code, at its end.
    """
    if _to_parent is not None:
        os.write(_to_parent, json.dumps(content).encode() + b"\n")


def is_supervised() -> bool:
    """Whether this process is a child that `supervise` forked."""
    return _to_parent is not None


def end(code: int, error: str) -> None:
    """Print an error and end the supervised child, from any thread."""
    _print_error_line(error)
    tell_parent(error=error, ended=code)
    os._exit(code)


def _why(stopped_by: int | None, code: int) -> str:
    """What ended the child."""
    if stopped_by is not None:
        return f"the driver was stopped by {signal.Signals(stopped_by).name}"
    if code == -signal.SIGKILL:
        return "the driver was killed (SIGKILL: out of memory?)"
    if code < 0:
        return f"the driver was ended by {signal.Signals(-code).name}"
    return "Ray ended the driver: the cluster's head, or Ray on this machine, died"


def _mark_stopped(messages: dict[str, Any], runs: Sequence[str]) -> None:
    """Say what ended the child, on stderr, in `--json` and in the runs' records."""
    why = messages["error"]
    _print_error_line(f"{why}: run the same command again to go on")
    if runs:
        from stillhouse.storage.filesystem import use_options
        from stillhouse.storage.run_record import mark_stopped

        with suppress(Exception):  # the store itself may be unreachable
            use_options(messages["store"], messages["options"])
            for run in runs:
                mark_stopped(run, why)


def _print_error_line(error: str) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        os.write(1, json.dumps({"status": "error", "error": error}).encode() + b"\n")
