"""Ids on the command line: any unique prefix of eight or more characters stands for the whole."""

import re
from collections.abc import Sequence

from stillhouse.errors import SpecError
from stillhouse.storage.filesystem import absolute_uri, exists, join
from stillhouse.storage.layout import artifact_names
from stillhouse.storage.reachability import KINDS

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Where a cluster's dashboard is, as Ray's own tools read it."""
DEFAULT_STORE = "./store"
ARTIFACTS = ("runs", *KINDS)
"""Folders of a store whose ids the verbs take that read artifacts."""
JOB_ID = re.compile(r"[0-9a-f]{64}-\d+")
JOB_PREFIX = re.compile(r"[0-9a-f]{8,64}(-\d+)?")
MIN_PREFIX = 8
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


def resolve(text: str, store: str | None, kinds: Sequence[str]) -> str:
    """The URI of the run or artifact whose id begins with `text`; text that is no id unchanged.

    Looks in the folders `kinds` of `store`, by default `./store`.

    Raises:
        SpecError: nothing in the store has such an id, or several things have.
    """
    if not _PREFIX.fullmatch(text) or exists(absolute_uri(text)):
        return text
    place = absolute_uri(store or DEFAULT_STORE)
    found = [
        f"{kind}/{name}"
        for kind in kinds
        for name in artifact_names(join(place, kind))
        if name.startswith(text)
    ]
    return join(place, only_one(text, found, f"{' or '.join(kinds)} of {place}"))


def only_one(text: str, found: Sequence[str], place: str) -> str:
    """The only thing found for a prefix.

    Raises:
        SpecError: nothing was found, or several things, which it names.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise SpecError(
            f"no id among {place} begins with {text!r}: give `--store`, or a path or URI"
        )
    raise SpecError(f"{text!r} may be any of {', '.join(found)}: give more characters")
