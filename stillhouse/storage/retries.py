"""Retries of storage operations, and the messages of those that fail.

This is the only layer that retries (`filesystem.filesystem` turns those of s3fs and botocore off):
an unreachable store is given up after `_PATIENCE_S` and one more try.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from stillhouse.errors import StillhouseError, StorageError, StoreUnreachableError

T = TypeVar("T")
_MAX_TRIES = 8
_PATIENCE_S = 40.0
_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0
_FINAL_ERRNO = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EREMCHG,  # s3fs: the bucket is in another region
}
_WRONG_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_NO_CREDENTIALS = {"NoCredentialsError", "ProfileNotFound"}
_FINAL_NAMES = {*_NO_CREDENTIALS, "ParamValidationError", "ResourceNotFoundError"}
_REFUSED = {401, 403}


def with_retries(action: Callable[[], T], what: str) -> T:
    """Run `action`; retry transient errors (time-outs, 5xx, resets) with backoff and jitter.

    Raises:
        StoreUnreachableError: after the last try. StorageError: at once, where another try cannot
            help (no access, no credentials, disk full). FileNotFoundError, FileExistsError and
            programming errors pass through.
    """
    started = time.monotonic()
    delay = _FIRST_DELAY_S
    for tries_left in reversed(range(_MAX_TRIES)):
        try:
            return action()
        except (FileNotFoundError, FileExistsError, StillhouseError):
            raise
        except Exception as error:
            # other built-in errors than these are bugs; ValueError is an unusable setting
            is_builtin = type(error).__module__ == "builtins"
            if is_builtin and not isinstance(error, OSError | ValueError):
                raise
            if not _is_transient(error):
                raise StorageError(explain(error, what)) from error
            if not tries_left or time.monotonic() - started > _PATIENCE_S:
                raise StoreUnreachableError(explain(error, what)) from error
            time.sleep(delay * (0.5 + random.random()))
            delay = min(delay * 2, _MAX_DELAY_S)
    raise AssertionError("unreachable")


def _is_transient(error: Exception) -> bool:
    """Whether a later try of the same call can succeed, by its type and code."""
    if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | ValueError):
        return False
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNO:
        return False
    return type(error).__name__ not in _FINAL_NAMES and not _is_refusal(error)


def _is_refusal(error: Exception) -> bool:
    """Whether the server does not accept the credentials: adlfs says it by a status, gcsfs by one
    or, of a 403, by the message alone.
    """
    status = getattr(error, "status_code", getattr(error, "code", None))
    return status in _REFUSED or str(error).startswith("Forbidden: ")


def explain(error: Exception, what: str) -> str:
    """A message for a storage failure: what failed, the error, and how to fix it."""
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    hint = _hint(error)
    return f"{what} failed: {said}" + (f" ({hint})" if hint else "")


def s3_code(error: Exception) -> str | None:
    """The error code of an S3 server's response, which s3fs keeps in the cause."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code")


def _hint(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EREMCHG or s3_code(error) in _WRONG_REGION:
        return "the bucket is in another region: set AWS_REGION or `storage_options`"
    if isinstance(error, PermissionError) or _is_refusal(error):
        return "no access: check the credentials and the permissions of the path"
    if code in {errno.ENOSPC, errno.EDQUOT}:
        return "disk full: free space and run again, finished parts are kept"
    if code == errno.EROFS:
        return "read-only: give another `store`"
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "ResourceNotFoundError":
        return "there is no such bucket: make it or give another `store`"
    if type(error).__name__ in _NO_CREDENTIALS:
        return "set AWS_PROFILE, AWS_ACCESS_KEY_ID or another of the standard sources"
    if type(error).__name__ in {"EndpointConnectionError", "ConnectTimeoutError"}:
        return "nothing answers there: check AWS_ENDPOINT_URL or `storage_options.endpoint_url`"
    return ""
