"""Numbered, create-only objects, `folder/00000001.json` and so on: the highest is current.

Published names and the pins of tokenizers and priors are stored like this: nothing is ever
overwritten, a roll-back writes a new number, and a reader always sees a whole version.
"""

from typing import Any

from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import join, list_names, read_bytes
from stillhouse.storage.sealed import seal, unseal


def versions(folder: str) -> list[int]:
    """The numbers in use, ascending."""
    names = (name.removesuffix(".json") for name in list_names(folder))
    return sorted(int(name) for name in names if name.isdigit())


def read_version(folder: str, number: int) -> dict[str, Any]:
    uri = join(folder, f"{number:08d}.json")
    return unseal(read_bytes(uri), uri)


def current(folder: str) -> dict[str, Any] | None:
    """The object with the highest number, or None."""
    numbers = versions(folder)
    return read_version(folder, numbers[-1]) if numbers else None


def append(folder: str, content: dict[str, Any]) -> int:
    """Add an object under the next free number, and return the number.

    Two writers get two numbers, unless they write the same content: existing bytes are compared, so
    that a put whose answer was lost is not repeated.
    """
    number = (versions(folder) or [0])[-1] + 1
    data = seal(content)
    while create_or_adopt(join(folder, f"{number:08d}.json"), data) != data:
        number += 1
    return number
