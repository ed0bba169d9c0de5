"""Comparison of the objects of a store with the digests that other objects give for them.

Manifests and receipts carry their own SHA-256 and those of the parts and files that they name; a
run's `digests.json` has those of its record. So every byte that a result depends on can be checked
from the store alone.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from stillhouse.errors import ArtifactError
from stillhouse.storage.artifact import parse_manifest, parse_receipt
from stillhouse.storage.filesystem import join, open_read
from stillhouse.storage.layout import MANIFEST, folder_about, places
from stillhouse.storage.reachability import KINDS, StoredObject, list_objects, read_objects, walk
from stillhouse.storage.run_record import DIGESTS
from stillhouse.storage.sealed import is_sealed, unseal

_BLOCK = 8 << 20
_AT_ONCE = 500
_ARTIFACT = re.compile(rf"({'|'.join(KINDS)})/[0-9a-f]{{64}}(/|$)")
_REMOVABLE = "checkpoints"
"""A training removes those that it no longer needs."""
Check: TypeAlias = tuple[str, str, str]
"""An object's URI, its sha256, and the path of the object that says so."""


@dataclass(slots=True)
class Survey:
    """What the objects of a store should be.

    Attributes:
        store: its URI.
        there: what it holds: bytes by path.
        expected: sha256 by path, and the path of the object that says so.
        problems: found while the objects that name others were read, a sentence each.
        checked: numbers of objects by kind.
    """

    store: str
    there: dict[str, int]
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    def checks(self) -> list[Check]:
        """The objects to compare; missing ones are added to `problems`."""
        found: list[Check] = []
        for path, (digest, by) in sorted(self.expected.items()):
            if path in self.there:
                found.append((join(self.store, path), digest, by))
            else:
                self.problems.append(f"{join(self.store, path)} is missing, {by} names it")
        return found

    def num_bytes(self) -> int:
        """Of all objects to compare."""
        return sum(self.there.get(path, 0) for path in self.expected)

    def read(self, item: StoredObject, data: bytes) -> None:
        """Add what an object says of others."""
        try:
            named = self._named(item, data, join(self.store, item.path))
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
        """sha256 by path of the objects that an object names; None where it is named by another."""
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

    def look_for(self, value: Any, base: str, by: str) -> None:
        """Check that the store has the artifacts that a JSON value names by URIs that begin with
        `base`.
        """
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                self.look_for(inner, base, by)
        elif isinstance(value, str) and value.startswith(base):
            path = value[len(base) :].rstrip("/")
            if _ARTIFACT.match(path) and not self._holds(path):
                self.problems.append(f"{join(self.store, path)} is missing, {by} names it")

    def _holds(self, path: str) -> bool:
        has_manifest = any(f"{place}/{MANIFEST}" in self.there for place in places(path))
        return path.startswith(f"{_REMOVABLE}/") or path in self.there or has_manifest


def _listed(store: str) -> tuple[Survey, list[StoredObject]]:
    objects = [item for item in list_objects(store) if not item.is_temporary]
    return Survey(store, {item.path: item.num_bytes for item in objects}), objects


def survey_store(store: str) -> Survey:
    """Survey a whole store."""
    survey, objects = _listed(store)
    texts = [item for item in objects if item.path.endswith(".json")]
    for start in range(0, len(texts), _AT_ONCE):
        batch = texts[start : start + _AT_ONCE]
        for item, data in zip(batch, read_objects(store, batch), strict=True):
            survey.read(item, data)
    return survey


def survey_result(store: str, folder: str) -> Survey:
    """Survey the run or artifact in `folder` of a store and everything that it depends on.

    A missing manifest is found where a run's result, or another manifest, names it.
    """
    survey, objects = _listed(store)
    own = {f"{folder}/{name}" for name in ("result.json", DIGESTS)}
    own |= {f"{place}/{MANIFEST}" for place in places(folder)}
    for item, data in walk(store, objects, [item for item in objects if item.path in own]):
        survey.read(item, data)
        if item.path.endswith(("/result.json", f"/{MANIFEST}")):
            try:
                content = json.loads(data)
            except ValueError:
                continue  # `read` has added the problem
            base = ""
            if item.path.endswith("/result.json"):
                base = f"{str(content.get('run')).rpartition('/runs/')[0]}/"
            survey.look_for(content, base, item.path)
    return survey


def differing(checks: Sequence[Check]) -> list[str]:
    """The problems of objects, a sentence each; they are read one after another, in blocks."""
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
