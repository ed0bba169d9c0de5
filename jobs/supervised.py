"""The driver of a run in a child process, so that whatever ends it leaves a word and exit code 4.

Ray ends the process of a driver at once, with exit code 1 and without a word, when the raylet that
it is connected to dies; the kernel does so where memory is short.
"""

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONCE_S = 1.0
_PR_SET_PDEATHSIG = 1
_to_parent: int | None = None


def supervise() -> None:
    """Return in a child process; the parent waits for it, and ends as it did.

    To be called before any thread was started. Signals reach the child once, whether they were
    sent to the parent or to its group; a killed parent takes the child with it.
    """
    global _to_parent
    sys.stdout.flush()
    sys.stderr.flush()
    parent, (heard, told) = os.getpid(), os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until it is known who gets them
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(heard)
        os.setpgid(0, 0)
        _die_with(parent)
        _to_parent = told
        return
    os.close(told)
    passed: dict[int, float] = {}

    def pass_on(number: int, _: object) -> None:
        last, passed[number] = passed.get(number, -_ONCE_S), time.monotonic()
        if passed[number] - last >= _ONCE_S:  # `timeout` sends to us and to our group
            os.kill(child, number)

    for number in _PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with open(heard, "rb") as pipe:
        said = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    ended = [one["ended"] for one in said if "ended" in one]
    began = next((one for one in said if "run" in one), None)
    if ended:
        os._exit(ended[0])
    os._exit(_explain(next(iter(passed), None), os.waitstatus_to_exitcode(status), began))


def tell(**content: Any) -> None:
    """Let the parent know: `run`, `store` and `options` when it begins, `ended` (its exit code)."""
    if _to_parent is not None:
        os.write(_to_parent, json.dumps(content).encode() + b"\n")


def is_child() -> bool:
    """Whether this process is one that `supervise` made."""
    return _to_parent is not None


def end(code: int, error: str) -> None:
    """End the child from any thread, with a word."""
    _say(error)
    tell(ended=code)
    os._exit(code)


def _die_with(parent: int) -> None:
    """SIGKILL when the parent dies, where the kernel offers that; at once if it is dead."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(4)


def _explain(passed: int | None, code: int, began: dict[str, Any] | None) -> int:
    """Say what ended the child, to people, `--json` and the run's record; the exit code."""
    if passed is not None:
        why = f"the driver was stopped by {signal.Signals(passed).name}"
    elif code == -signal.SIGKILL:
        why = "the driver was killed (SIGKILL: out of memory?)"
    elif code < 0:
        why = f"the driver was ended by {signal.Signals(-code).name}"
    else:
        why = "Ray ended the driver: the cluster's head, or Ray on this machine, died"
    _say(f"{why}: run the same command again to go on")
    if began is not None:
        from stillhouse.storage.filesystem import use_options
        from stillhouse.storage.run_record import mark_stopped

        with suppress(Exception):  # the store may be what is gone
            use_options(began["store"], began["options"])
            mark_stopped(began["run"], why)
    return 4


def _say(error: str) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        os.write(1, json.dumps({"status": "error", "error": error}).encode() + b"\n")
