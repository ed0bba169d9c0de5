"""What a run leaves behind: parts, receipts of tasks, manifests. All created, never overwritten.

* A **part** is a Parquet file named by the fingerprint of what it is made from.
* A **receipt** says that a task is finished: its parts with their checksums, and its counts. It
  is small, so that a run which finds 10,000 finished tasks reads no data.
* A **manifest** makes an artifact: an ordered list of parts. A reader sees only manifests.

Layout of a store: `<kind>/parts/<fingerprint>.parquet`, `<kind>/receipts/<fingerprint>.json`,
`<kind>/<fingerprint>/` for an artifact, and its manifest where `stillhouse.storage.layout` says.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import sha256
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import join, list_names, read_bytes, read_many
from stillhouse.storage.layout import MANIFEST, PART_LIST, about, folder_about, read_manifest
from stillhouse.storage.parquet import ROW_GROUP, parquet_bytes, parse_table, read_table
from stillhouse.storage.sealed import seal, unseal

_MAX_INLINE_PARTS = 300


@dataclass(frozen=True, slots=True)
class PartRef:
    """One part: `path` is relative to the store."""

    path: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an artifact: where it is, and what it should be."""

    uri: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """A finished task: the parts it made, its counts by name, and anything small worth keeping.

    `files` are what it made besides: sha256 by path in the store.
    """

    task: str
    parts: tuple[PartRef, ...]
    counts: dict[str, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Of all that it made."""
        return [*(part.path for part in self.parts), *self.files]


@dataclass(frozen=True, slots=True)
class Manifest:
    """An artifact: ordered parts (or named files), what it was made from, how, and on what."""

    kind: str
    fingerprint: str
    parts: tuple[PartRef, ...]
    inputs: dict[str, Any]
    settings: dict[str, Any]
    totals: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Files in the manifest's folder, by name, with their sha256."""

    @property
    def num_rows(self) -> int:
        """Rows over all parts."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens over all parts."""
        return sum(part.num_tokens for part in self.parts)


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide bytes."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")}


class Store:
    """A folder or URI prefix under which everything lies. Cheap to make, safe to pickle."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.unread: list[str] = []
        """Input files whose content `plan` does not know."""

    def path(self, *names: str) -> str:
        """The URI of something in the store."""
        return join(self.uri, *names)

    def put_part(
        self,
        path: str,
        table: pa.Table,
        *,
        num_tokens: int,
        row_group: int = ROW_GROUP,
        agrees: Callable[[pa.Table], bool] | None = None,
    ) -> PartRef:
        """Create a part, or adopt the one that another writer made first.

        Args:
            path: in the store.
            table: its content.
            num_tokens: of it.
            row_group: rows of each.
            agrees: whether content that stands there is the same up to what devices round.

        Raises:
            ArtifactError: other content stands there.
        """
        data = parquet_bytes(table, row_group=row_group)
        stands = create_or_adopt(self.path(path), data)
        num_rows = table.num_rows if stands is data else _num_rows(stands, path)
        if num_rows != table.num_rows:
            raise ArtifactError(
                f"part {path} has {num_rows} rows where this run makes {table.num_rows}: "
                "its inputs are not what its name says; run `stillhouse verify`"
            )
        if stands != data and agrees is not None and not agrees(read_table(self.path(path))):
            raise ArtifactError(
                f"part {path} holds other values than are made now: remove it, or begin a new "
                "`store`"
            )
        return PartRef(path, num_rows, num_tokens, len(stands), sha256(stands))

    def finished(self, kind: str, tasks: Iterable[str]) -> dict[str, Receipt]:
        """The receipts among `tasks` whose parts are all there: two listings, a read for each.

        A task that lost a part is one to do again.
        """
        names = set(list_names(self.path(kind, "receipts")))
        there = [task for task in tasks if f"{task}.json" in names]
        uris = [self._receipt_uri(kind, task) for task in there]
        receipts = list(map(parse_receipt, read_many(uris), uris))
        lost = self._lost(path for receipt in receipts for path in receipt.paths)
        return {r.task: r for r in receipts if lost.isdisjoint(r.paths)}

    def _lost(self, paths: Iterable[str]) -> set[str]:
        """Those of some paths in the store that are not there: a listing of each folder."""
        wanted = set(paths)
        folders = sorted({path.rpartition("/")[0] for path in wanted})
        names = {folder: list_names(self.path(folder)) for folder in folders}
        return wanted - {f"{folder}/{name}" for folder in folders for name in names[folder]}

    def put_receipt(self, kind: str, receipt: Receipt) -> Receipt:
        """Say that a task is finished; the receipt that came first is the one that counts."""
        uri = self._receipt_uri(kind, receipt.task)
        stands = parse_receipt(create_or_adopt(uri, seal(asdict(receipt))), uri)
        made = _digests(receipt.parts) | receipt.files
        _check_same(uri, _digests(stands.parts) | stands.files, made)
        return stands

    def _receipt_uri(self, kind: str, task: str) -> str:
        return self.path(kind, "receipts", f"{task}.json")

    def put_manifest(self, manifest: Manifest) -> Manifest:
        """Make the artifact visible, or adopt the manifest of a writer that came first.

        Returns:
            The manifest as any reader sees it from now on.
        """
        place = about(self.path(manifest.kind, manifest.fingerprint))
        content = asdict(manifest)
        listed = None
        if len(manifest.parts) > _MAX_INLINE_PARTS:
            rows = parquet_bytes(pa.Table.from_pylist(content.pop("parts")))
            listed = create_or_adopt(join(place, PART_LIST), rows)
            content["parts_sha256"] = sha256(listed)
        uri = join(place, MANIFEST)
        data = create_or_adopt(uri, seal(content, indent=1))
        stands = parse_manifest(data, place, manifest.kind, listed)
        made = _digests(manifest.parts) | manifest.files
        _check_same(uri, _digests(stands.parts) | stands.files, made)
        return stands

    def get_manifest(self, kind: str, fingerprint: str) -> Manifest:
        """The manifest of an artifact.

        Raises:
            ArtifactError: missing, broken, newer, or of another kind.
        """
        return load_manifest(self.path(kind, fingerprint), kind)

    def find_manifest(self, kind: str, fingerprint: str) -> Manifest | None:
        """The manifest, or None where the artifact is not there (yet), or not whole any more.

        One of an older layout is not there: it is made again.
        """
        place = about(f"{kind}/{fingerprint}")
        try:
            data = read_bytes(self.path(place, MANIFEST))
        except FileNotFoundError:
            return None
        manifest = parse_manifest(data, self.path(place), kind)
        files = [f"{place}/{name}" for name in manifest.files]
        return None if self._lost([*(part.path for part in manifest.parts), *files]) else manifest


def _digests(parts: Iterable[PartRef]) -> dict[str, str]:
    return {part.path: part.sha256 for part in parts}


def _check_same(uri: str, stands: Mapping[str, str], made: Mapping[str, str]) -> None:
    """A task that is done again, for a part was lost, has to give what its first name says."""
    different = sorted(path for path in made if made[path] != stands.get(path, made[path]))
    if different:
        raise ArtifactError(
            f"{uri} names other bytes of {different[0]} than were made now, maybe by other "
            "versions of the libraries: remove it, or begin a new `store`"
        )


def load_manifest(folder: str, kind: str | None = None) -> Manifest:
    """The manifest of the artifact in `folder`; with `kind`, only of that kind.

    Raises:
        ArtifactError: missing, broken, newer, or of another kind.
    """
    return find_artifact(folder, kind)[1]


def find_artifact(folder: str, kind: str | None = None) -> tuple[str, Manifest]:
    """As `load_manifest`, and before it the URI of the folder in which its files lie."""
    try:
        place, data = read_manifest(folder)
    except FileNotFoundError as error:
        raise ArtifactError(f"no artifact at {folder}: there is no {MANIFEST}") from error
    return place, parse_manifest(data, place, kind)


def parse_manifest(
    data: bytes, place: str, kind: str | None, listed: bytes | None = None
) -> Manifest:
    """The manifest in `data`, from the folder `place`; `listed` are the bytes of its list of parts
    where at hand.
    """
    try:
        content = unseal(data, join(place, MANIFEST))
        digest = content.pop("parts_sha256", None)
        rows = content["parts"] if digest is None else _listed_parts(place, digest, listed)
        content["parts"] = tuple(PartRef(**row) for row in rows)
        manifest = Manifest(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{place}/{MANIFEST} is broken: {error}") from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{folder_about(place)} holds `{manifest.kind}` where `{kind}` is needed"
        )
    return manifest


def _listed_parts(place: str, digest: str, listed: bytes | None) -> list[dict[str, Any]]:
    uri = join(place, PART_LIST)
    try:
        data = read_bytes(uri) if listed is None else listed
    except FileNotFoundError as error:
        raise ArtifactError(f"{uri} is missing, the list that its manifest names") from error
    if sha256(data) != digest:
        raise ArtifactError(f"{uri} is not the list that its manifest names")
    return parse_table(data).to_pylist()


def parse_receipt(data: bytes, uri: str) -> Receipt:
    """The receipt in `data`, the object at `uri`.

    Raises:
        ArtifactError: broken, newer, or of another task.
    """
    try:
        content = unseal(data, uri)
        content["parts"] = tuple(PartRef(**part) for part in content["parts"])
        receipt = Receipt(**content)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{uri} is broken: {error}") from error
    if not uri.endswith(f"/{receipt.task}.json"):
        raise ArtifactError(f"{uri} is the receipt of another task, {receipt.task}")
    return receipt


def _num_rows(data: bytes, path: str) -> int:
    try:
        return pq.read_metadata(pa.BufferReader(data)).num_rows
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"part {path} is broken: {error}") from error
