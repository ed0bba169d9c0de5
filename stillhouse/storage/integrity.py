"""What every object of a store should be, by those that name it, and which are something else.

Manifests and receipts carry their own SHA-256 and those of the parts and files that they name; a
run's `digests.json` has those of its record. So every byte that a result rests on can be checked
from the store alone.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stillhouse.errors import ArtifactError
from stillhouse.storage.artifact import parse_manifest, parse_receipt
from stillhouse.storage.filesystem import join, open_read, read_many
from stillhouse.storage.layout import MANIFEST, folder_about, places
from stillhouse.storage.reachability import KINDS, StoredObject, list_objects, walk
from stillhouse.storage.run_record import DIGESTS
from stillhouse.storage.sealed import is_sealed, unseal

_BLOCK = 8 << 20
_AT_ONCE = 500
_ARTIFACT = re.compile(rf"({'|'.join(KINDS)})/[0-9a-f]{{64}}(/|$)")
_LOOSE = "checkpoints"
"""Of these a training removes what it needs no more."""
Check: TypeAlias = tuple[str, str, str]
"""An object's URI, its sha256, and the path of the object that says so."""


@dataclass(slots=True)
class Survey:
    """What objects of a store should be.

    Attributes:
        store: its URI.
        there: what it holds: bytes by path.
        expected: sha256 by path, and who says so.
        problems: found while the objects that name others were read, a sentence each.
        checked: how many of what.
    """

    store: str
    there: dict[str, int]
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def checks(self) -> list[Check]:
        """The objects to compare; those that are missing become problems."""
        for path, (_, by) in sorted(self.expected.items()):
            if path not in self.there:
                self.problems.append(f"{join(self.store, path)} is missing, {by} names it")
        return [
            (join(self.store, path), digest, by)
            for path, (digest, by) in sorted(self.expected.items())
            if path in self.there
        ]

    def num_bytes(self) -> int:
        """Of all that is to compare."""
        return sum(self.there.get(path, 0) for path in self.expected)

    def read(self, item: StoredObject, data: bytes) -> None:
        """Take in an object that may name others."""
        uri = join(self.store, item.path)
        try:
            named = self._named(item, data, uri)
        except ArtifactError as error:
            self.problems.append(str(error))
            return
        if named is None:
            return
        self.checked["objects without a digest"] += not is_sealed(data)
        for path, digest in named.items():
            known = self.expected.setdefault(path, (digest, item.path))
            if known[0] != digest:
                self.problems.append(f"{known[1]} and {item.path} differ about {path}")

    def _named(self, item: StoredObject, data: bytes, uri: str) -> dict[str, str] | None:
        """Paths with their sha256; None of an object that another one names."""
        folder, _, file = item.path.rpartition("/")
        if item.kind in KINDS and file == MANIFEST:
            self.checked["manifests"] += 1
            manifest = parse_manifest(data, join(self.store, folder), None)
            if folder_about(folder) != f"{manifest.kind}/{manifest.fingerprint}":
                raise ArtifactError(f"{uri} is the manifest of another artifact")
            files = {f"{folder}/{name}": digest for name, digest in manifest.files.items()}
            return {part.path: part.sha256 for part in manifest.parts} | files
        if item.kind in KINDS and folder.endswith("/receipts"):
            self.checked["receipts"] += 1
            receipt = parse_receipt(data, uri)
            return {part.path: part.sha256 for part in receipt.parts} | receipt.files
        if item.kind == "runs" and file == DIGESTS:
            self.checked["runs"] += 1
            return {f"{folder}/{name}": digest for name, digest in unseal(data, uri).items()}
        if item.kind in {"names", "pins", "cache"}:
            self.checked[item.kind] += 1
            unseal(data, uri)
            return {}
        return None

    def look_for(self, text: Any, base: str, by: str) -> None:
        """Objects and folders of the store that a JSON value names by URIs that begin with `base`
        have to be there.
        """
        if isinstance(text, dict | list):
            for value in text.values() if isinstance(text, dict) else text:
                self.look_for(value, base, by)
        elif isinstance(text, str) and text.startswith(base):
            path = text[len(base) :].rstrip("/")
            if _ARTIFACT.match(path) and not self._holds(path):
                self.problems.append(f"{join(self.store, path)} is missing, {by} names it")

    def _holds(self, path: str) -> bool:
        whole = any(f"{place}/{MANIFEST}" in self.there for place in places(path))
        return path.startswith(f"{_LOOSE}/") or path in self.there or whole


def survey_store(store: str) -> Survey:
    """All of a store. Objects that nothing names, such as those of a run at work, are counted."""
    objects = [item for item in list_objects(store) if not item.is_temporary]
    survey = Survey(store, {item.path: item.num_bytes for item in objects})
    speaking = [item for item in objects if item.path.endswith(".json")]
    for start in range(0, len(speaking), _AT_ONCE):
        some = speaking[start : start + _AT_ONCE]
        for item, data in zip(some, _read(store, some), strict=True):
            survey.read(item, data)
    return survey


def survey_result(store: str, folder: str) -> Survey:
    """All that the run or artifact in `folder` of a store rests on, itself included.

    A manifest that is missing is found where a run's result, or another manifest, names it.
    """
    objects = [item for item in list_objects(store) if not item.is_temporary]
    survey = Survey(store, {item.path: item.num_bytes for item in objects})
    own = {f"{folder}/{name}" for name in ("result.json", DIGESTS)}
    own |= {f"{place}/{MANIFEST}" for place in places(folder)}
    roots = [item for item in objects if item.path in own]
    for item, data in walk(store, objects, roots):
        survey.read(item, data)
        if item.path.endswith("/result.json"):
            result = _parsed(data)
            survey.look_for(result, f"{str(result.get('run')).rpartition('/runs/')[0]}/", item.path)
        elif item.path.endswith(f"/{MANIFEST}"):
            survey.look_for(_parsed(data), "", item.path)
    return survey


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:  # found elsewhere
        return {}


def _read(store: str, items: Iterable[StoredObject]) -> list[bytes]:
    return read_many([join(store, item.path) for item in items])


def differing(checks: Sequence[Check]) -> list[str]:
    """What is wrong with objects, a sentence each; they are read in blocks, one after another."""
    return list(_differing(checks))


def _differing(checks: Sequence[Check]) -> Iterator[str]:
    for uri, digest, by in checks:
        found = hashlib.sha256()
        try:
            with open_read(uri) as file:
                while block := file.read(_BLOCK):
                    found.update(block)
        except FileNotFoundError:
            yield f"{uri} is missing, {by} names it"
            continue
        if found.hexdigest() != digest:
            yield f"{uri} has sha256 {found.hexdigest()[:12]}, {by} says {digest[:12]}"
