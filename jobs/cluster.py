"""Connecting to Ray: an existing cluster, or one of our own on this machine."""

import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from stillhouse.errors import StillhouseError
from stillhouse.spec import ComputeSettings

ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
"""Large temporaries stay with the process: a tenth more speed for models on CPUs (glibc)."""
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    **ALLOCATOR,
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def cluster(
    compute: ComputeSettings, worker_env: dict[str, str], num_actors: int
) -> Generator[None]:
    """A Ray session for the length of a job.

    Joins `compute.address` or RAY_ADDRESS where one is given; else starts Ray here, wide enough
    for the actors that were asked for, and stops it at the end. A session that the caller opened
    before is used and left alone.

    Raises:
        StillhouseError: the address does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    address = compute.address or os.environ.get("RAY_ADDRESS")
    environment = _QUIET | {"OMP_NUM_THREADS": str(compute.threads_per_worker)} | worker_env
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    try:
        if address:
            options["address"] = address
        else:
            cpus = max(os.cpu_count() or 1, int(num_actors * compute.cpus_per_worker))
            # "local": without it Ray would look for any session that was started on this machine
            options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        with _silent_stderr():
            ray.init(**options)
    except Exception as error:  # Ray raises a bare one when its own start takes too long
        reason = str(error).strip().splitlines()[0]
        raise StillhouseError(
            f"cannot connect to Ray at {address or 'this machine'}: {reason}"
        ) from error
    with redirect_stdout(sys.stderr):  # Ray prints of lost nodes; stdout is for results
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _silent_stderr() -> Generator[None]:
    """Ray's core says a line of its own as it starts; what goes wrong is raised all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
