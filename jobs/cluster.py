"""Connecting to Ray: an existing cluster, or a session started on this machine."""

import logging
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from stillhouse.errors import ClusterError, LostClusterError, StillhouseError
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
_PROBE_S = 10.0
_WATCH_S = 5.0
_MAX_FAILURES = 13
_MAX_FOLDER = 40
"""Characters of the temporary folder: Ray appends up to 65 for its sockets, which may have 107."""


def token() -> tuple[str, str] | None:
    """The cluster's token and where it is from: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names no readable file, or it cannot be a token.
    """
    secret, source = os.environ.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not secret:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        source = path or str(Path.home() / ".ray" / "auth_token")
        try:
            secret = Path(source).read_text(errors="replace").strip()
        except OSError as error:
            if path:
                raise ClusterError(f"RAY_AUTH_TOKEN_PATH: {path}: {error.strerror}") from None
            return None
    if not re.fullmatch(r"[!-~]+", secret):
        raise ClusterError(f"the token from {source} has characters that no token has")
    return secret, source


def token_refused(place: str, source: str | None) -> ClusterError:
    """The error of a cluster that refuses the token from `source`; None: there is no token."""
    if source is None:
        return ClusterError(
            f"the cluster at {place} wants a token and there is none here: set "
            "RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token"
        )
    return ClusterError(f"the cluster at {place} refuses the token from {source}")


def check_version(place: str, theirs: str) -> None:
    """Refuse a cluster whose Ray is of another minor version than ours."""
    import ray

    mine = ray.__version__
    if theirs.split(".")[:2] != mine.split(".")[:2]:
        raise ClusterError(
            f"the cluster at {place} runs Ray {theirs}, this machine Ray {mine}: use the same "
            "minor version on both (another image there, or another Ray here)"
        )


@contextmanager
def cluster(
    compute: ComputeSettings,
    worker_env: dict[str, str],
    num_actors: int,
    lost: Callable[[str], None] | None = None,
) -> Generator[None]:
    """A Ray session for the length of a job.

    Joins `compute.address` or RAY_ADDRESS where one is given; else starts Ray here, with CPUs for
    `num_actors`, and stops it at the end. A session that the caller opened before is used and left
    open. Meanwhile stdout is redirected to stderr, because Ray's threads print.

    Args:
        compute: address, CPUs and threads of a worker.
        worker_env: environment variables of all workers.
        num_actors: how many have to run at once.
        lost: called in another thread, with the reason, when the cluster's head has not answered
            for more than a minute; Ray's own calls may wait for it forever.

    Raises:
        ClusterError: nothing answers at the address, or it needs another token or Ray version.
        StillhouseError: Ray does not start.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        with redirect_stdout(sys.stderr):
            yield
        return
    address = head_at(compute.address or os.environ.get("RAY_ADDRESS"))
    environment = _QUIET | {"OMP_NUM_THREADS": str(compute.threads_per_worker)} | worker_env
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    with ExitStack() as stack:
        if address is not None:
            options["address"] = address
        else:
            cpus = max(os.cpu_count() or 1, int(num_actors * compute.cpus_per_worker))
            # "local": without it Ray would look for any session that was started on this machine
            options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
            options |= stack.enter_context(_short_folder())
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            with _silent_stderr():
                ray.init(**options)
        except Exception as error:  # Ray raises a bare one when its own start takes too long
            place, reason = address or "this machine", str(error).strip().splitlines()[0]
            raise StillhouseError(f"cannot connect to Ray at {place}: {reason}") from error
        stack.callback(ray.shutdown)
        gcs = ray.get_runtime_context().gcs_address
        if lost is not None:
            ended = threading.Event()
            threading.Thread(target=_watch, args=(gcs, ended, lost), daemon=True).start()
            stack.callback(ended.set)
        try:
            yield
        except Exception as error:
            gone = None if isinstance(error, StillhouseError) else silence_of(gcs)
            if gone is None:
                raise
            raise LostClusterError(f"{gone}: run the same command again once it is up") from error


def head_at(given: str | None) -> str | None:
    """HOST:PORT of the head at an address, after checking that it accepts us; None for local.

    Ray alone waits for minutes where nothing listens, and never enables a token by itself.
    """
    if not given or given == "local":
        return None
    if "://" in given:
        raise ClusterError(
            f"`run` cannot use the Ray address {given!r} (`compute.address` or RAY_ADDRESS): on a "
            "machine of the cluster give the head's HOST:6379; from elsewhere use `stillhouse "
            "submit SPEC --address http://HOST:8265`"
        )
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address = canonicalize_bootstrap_address(given)
    except (ValueError, OSError) as error:
        raise ClusterError(f"no Ray cluster at {given!r}: {error}") from None
    if address is not None:
        _check_head(address, address if given == "auto" else given)
    return address


def _check_head(address: str, place: str) -> None:
    """Ask the head for its version; enable the token where it needs one."""
    version = _version_at(address, place, None)
    if version is None:
        found = token()
        version = None if found is None else _version_at(address, place, found[0])
        if version is None:
            raise token_refused(place, found[1] if found else None)
        from ray._private.authentication import authentication_token_setup as setup

        with _silent_stderr():
            enabled = setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        if not enabled:
            raise ClusterError(
                f"the cluster at {place} wants a token, which RAY_AUTH_MODE="
                f"{os.environ.get('RAY_AUTH_MODE')} keeps back: unset it, or set it to `token`"
            )
    check_version(place, version)


def _version_at(address: str, place: str, secret: str | None) -> str | None:
    """The version of Ray at a head; None where it needs another token than `secret`.

    Raises:
        ClusterError: no head answers there.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    channel: Any = init_grpc_channel(address)
    ask: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    sent = [("authorization", f"Bearer {secret}")] if secret is not None else []
    try:
        request = messages.CheckAliveRequest()
        return ask.CheckAlive(request, timeout=_PROBE_S, metadata=sent).ray_version
    except grpc.RpcError as error:
        code: Any = error.code()  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        channel.close()
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return None
    raise ClusterError(
        f"no Ray cluster answers at {place} ({code.name.lower()}): is it up, and is this its "
        "head (usually port 6379)?"
    )


def silence_of(address: str) -> str | None:
    """Why the head at HOST:PORT cannot be reached; None where something listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _WATCH_S).close()
    except OSError as error:
        return f"the head of the cluster at {address} does not answer any more ({error})"
    return None


def died_here() -> str | None:
    """Which process of a Ray that was started in this process has ended; None where none has.

    Ray itself may wait for ever for a raylet that was killed together with its workers.
    """
    from ray._private import worker

    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    dead = [name for name, _ in node.dead_processes()] if node is not None else []
    lost = next((name for name in ("raylet", "gcs_server") if name in dead), None)
    return f"Ray's {lost} on this machine has died" if lost else None


def _watch(address: str, ended: threading.Event, lost: Callable[[str], None]) -> None:
    """Call `lost` when the head has not answered for more than a minute, as long as Ray waits, or a
    process of a local Ray has been dead for as long.
    """
    failures = 0
    while not ended.wait(_WATCH_S):
        gone = silence_of(address) or died_here()
        failures = failures + 1 if gone else 0
        if gone and failures >= _MAX_FAILURES:
            lost(gone)
            return


@contextmanager
def _short_folder() -> Generator[dict[str, Any]]:
    """Options of `ray.init` where the path of its usual folder is too long for its sockets.

    Objects are still spilled to the usual folder.
    """
    from ray._common.utils import get_default_ray_temp_dir

    usual = get_default_ray_temp_dir()
    if len(os.fsencode(usual)) <= _MAX_FOLDER:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as made:
        yield {"_temp_dir": made, "object_spilling_directory": usual}


@contextmanager
def _silent_stderr() -> Generator[None]:
    """Hide the line that Ray's core prints as it starts; errors are raised all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
