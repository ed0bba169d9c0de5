"""What Ray's tasks and actors gave, or the error that one of them raised."""

from typing import Any

import ray
from ray.exceptions import RayTaskError

from stillhouse.errors import StillhouseError


def get_result(references: Any) -> Any:
    """`ray.get`, but an error of our own is raised as it was, without Ray's frames around it.

    What `ray.get` raises is an instance of the cause's class as well, made without the attributes
    of either: only its `cause` can be relied on.
    """
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, StillhouseError):
            raise error.cause from None
        raise
