"""A message to a webhook when `run` ends with an error (`on_failure`).

The address is a secret: it is in the environment, and never in a spec, a message or a log. A
webhook that fails costs a warning, never the run.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from stillhouse.jobs.chain_spec import AnySpec

_ATTEMPTS, _PAUSE_S, _TIMEOUT_S = 3, 2.0, 10.0
_STATES = {2: "bad spec", 3: "bad input data", 4: "stopped, the same command goes on"}


def told_of(spec: AnySpec) -> dict[str, Any]:
    """What a message says of a job, and `variable`, which holds the address; {} if none is wanted.

    Warns where the variable is not set.
    """
    if spec.on_failure is None:
        return {}
    variable = spec.on_failure.webhook_env
    if not os.environ.get(variable):
        _warn(f"{variable} is not set: nobody will be told if this run fails")
    return {"variable": variable, "job": spec.job, "name": spec.name, "store": spec.store}


def post_failure(told: Mapping[str, Any], code: int, error: str | None, run: str | None) -> None:
    """Post one JSON object: job, name, store, run, exit_code, error, and `text` for chat rooms."""
    content = {**told, "run": run, "exit_code": code, "error": error}
    variable = str(content.pop("variable"))
    address = os.environ.get(variable)
    if not address:
        return
    what = content["name"] or f"job: {content['job']}"
    said = (error or "").partition("\n")[0]
    state = _STATES.get(code, "an error")
    text = f"Stillhouse: {what} ended with exit code {code} ({state}). {said}"
    body = json.dumps({"text": text.strip(), **content}).encode()
    if not address.startswith(("http://", "https://")):
        _warn(f"{variable} holds no http(s) address")
        return
    request = Request(address, body, {"Content-Type": "application/json"})
    why = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE_S if attempt else 0)
        try:
            with urlopen(request, timeout=_TIMEOUT_S):
                return
        except HTTPError as refused:
            why = f"it answers {refused.code}"
            if refused.code < 500 and refused.code != 429:
                break
        except (OSError, ValueError) as failure:  # the message of a ValueError has the address
            why = str(failure) if isinstance(failure, OSError) else "no such address"
    _warn(f"the webhook of {variable} was not told: {why}")


def _warn(text: str) -> None:
    print(f"warning: on_failure: {text}", file=sys.stderr, flush=True)
