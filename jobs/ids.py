"""Ids on the command line: any unique prefix of eight or more characters stands for the whole."""

import re
from collections.abc import Sequence

from stillhouse.errors import SpecError
from stillhouse.storage.filesystem import absolute_uri, exists, join, list_names
from stillhouse.storage.layout import artifact_names
from stillhouse.storage.reachability import KINDS
from stillhouse.storage.run_record import read_status

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
"""Where a cluster's dashboard is, as Ray's own tools read it."""
DEFAULT_STORE = "./store"
ARTIFACTS = ("runs", *KINDS)
"""Folders of a store whose ids the verbs take that read artifacts."""
JOB_ID = re.compile(r"[0-9a-f]{64}-\d+")
MIN_PREFIX = 8
_PREFIX = re.compile(r"[0-9a-f]{8,64}")
_JOB_PREFIX = re.compile(r"[0-9a-f]{8,64}(-\d+)?")


def resolve(text: str, store: str | None, kinds: Sequence[str]) -> str:
    """The URI of the run or artifact that a prefix of its id means; other text as it is.

    Args:
        text: what was typed.
        store: where to look; default `./store`.
        kinds: folders of the store to look in.

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
    return join(place, one_of(text, found, f"{' or '.join(kinds)} of {place}"))


def is_job(text: str) -> bool:
    """Whether it may be (a prefix of) a submitted job's id and nothing on disk."""
    return _JOB_PREFIX.fullmatch(text) is not None and not exists(absolute_uri(text))


def jobs_in(store: str) -> list[str]:
    """Ids of the submitted jobs whose runs are in a store."""
    folder = join(absolute_uri(store), "runs")
    states = [read_status(join(folder, name)) or {} for name in list_names(folder)]
    attempts = [one for state in states for one in (state, *state.get("earlier", []))]
    return sorted({one["submission"] for one in attempts if one.get("submission")})


def one_of(text: str, found: Sequence[str], place: str) -> str:
    """The one thing that was found for a prefix.

    Raises:
        SpecError: nothing, or several things: naming them.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise SpecError(
            f"no id among {place} begins with {text!r}: give `--store`, or a path or URI"
        )
    raise SpecError(f"{text!r} may be any of {', '.join(found)}: give more characters")
