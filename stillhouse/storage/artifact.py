"""What a run leaves in a store: parts, receipts of tasks, manifests. None is ever overwritten.

* A **part** is a Parquet file named by the fingerprint of what it is made from.
* A **receipt** records a finished task: its parts with their checksums, and its counts. It is
  small, so that a run which finds 10,000 finished tasks reads no data.
* A **manifest** defines an artifact: an ordered list of parts. Readers see manifests only.

Layout: `<kind>/parts/<fingerprint>.parquet`, `<kind>/receipts/<fingerprint>.json`,
`<kind>/<fingerprint>/` for an artifact; its manifest lies where `stillhouse.storage.layout` says.
"""

from collections.abc import Callable, Iterable
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
from stillhouse.storage.receipt_cache import cache_receipts, cached_receipts
from stillhouse.storage.sealed import seal, unseal

_MAX_INLINE_PARTS = 300


@dataclass(frozen=True, slots=True)
class Part:
    """One part of an artifact: where it is, and what it should be."""

    uri: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PartRef:
    """One part: `path` is relative to the store."""

    path: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    sha256: str

    def under(self, store: str) -> Part:
        """The same with its URI in the store at `store`."""
        uri = join(store, self.path)
        return Part(uri, self.num_rows, self.num_tokens, self.num_bytes, self.sha256)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A finished task.

    Attributes:
        task: its fingerprint.
        parts: in order.
        counts: by name.
        info: small JSON values.
        files: sha256 by path in the store of what it made besides.
    """

    task: str
    parts: tuple[PartRef, ...]
    counts: dict[str, int] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Of parts and files."""
        return [*(part.path for part in self.parts), *self.files]


@dataclass(frozen=True, slots=True)
class Manifest:
    """An artifact: ordered parts (or named files), what it was made from and how.

    `files` are those in the manifest's folder: sha256 by name.
    """

    kind: str
    fingerprint: str
    parts: tuple[PartRef, ...]
    inputs: dict[str, Any]
    settings: dict[str, Any]
    totals: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)


def libraries() -> dict[str, str]:
    """Versions of the libraries that results may depend on."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")}


class Store:
    """The folder or URI prefix that everything is stored under. Can be pickled.

    Attributes:
        uri: without a slash at the end.
        unread: input files whose content `plan` does not know.
        map_large: `map` over many gigabytes of input, on a cluster; None: threads here do it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.unread: list[str] = []
        self.map_large: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] | None = None

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    def path(self, *names: str) -> str:
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

        Raises:
            ArtifactError: the existing part has other rows, or other values by `agrees`, which
                compares up to rounding of devices.
        """
        data = parquet_bytes(table, row_group=row_group)
        stored = create_or_adopt(self.path(path), data)
        num_rows = table.num_rows
        if stored is not data:
            try:
                num_rows = pq.read_metadata(pa.BufferReader(stored)).num_rows
            except pa.ArrowInvalid as error:
                raise ArtifactError(f"part {path} is broken: {error}") from error
        if num_rows != table.num_rows:
            raise ArtifactError(
                f"part {path} has {num_rows} rows where this run makes {table.num_rows}: "
                "its inputs are not what its name says; run `stillhouse verify`"
            )
        if stored != data and agrees is not None and not agrees(read_table(self.path(path))):
            raise ArtifactError(
                f"part {path} has other values than are made now: remove it, or begin a new `store`"
            )
        return PartRef(path, num_rows, num_tokens, len(stored), sha256(stored))

    def finished(self, kind: str, tasks: Iterable[str]) -> dict[str, Receipt]:
        """The receipts of those tasks whose parts all exist, by task: two listings, and a read for
        each receipt that the cache has not. A task that lost a part has to be done again.
        """
        names = set(list_names(self.path(kind, "receipts")))
        there = [task for task in tasks if f"{task}.json" in names]
        known = cached_receipts(self.uri, kind, there)
        others = [task for task in there if task not in known]
        known |= zip(others, read_many([self._receipt_uri(kind, t) for t in others]), strict=True)
        receipts = [parse_receipt(known[task], self._receipt_uri(kind, task)) for task in there]
        missing = self._missing(path for receipt in receipts for path in receipt.paths)
        return {r.task: r for r in receipts if missing.isdisjoint(r.paths)}

    def _missing(self, paths: Iterable[str]) -> set[str]:
        """The paths in the store that do not exist: one listing of each folder."""
        wanted = set(paths)
        folders = sorted({path.rpartition("/")[0] for path in wanted})
        names = {folder: list_names(self.path(folder)) for folder in folders}
        return wanted - {f"{folder}/{name}" for folder in folders for name in names[folder]}

    def remember(self, kind: str, receipts: Iterable[Receipt]) -> None:
        """Keep receipts together, if they are many, so that a later `finished` reads them at once.

        The finished tasks of one kind, as a step knows them when it ends.
        """
        by_task = {one.task: one for one in receipts}
        cache_receipts(self.uri, kind, by_task, lambda task: seal(asdict(by_task[task])))

    def put_receipt(self, kind: str, receipt: Receipt) -> Receipt:
        """Record that a task is finished; the first receipt is kept, and returned."""
        uri = self._receipt_uri(kind, receipt.task)
        stored = parse_receipt(create_or_adopt(uri, seal(asdict(receipt))), uri)
        _check_same(uri, stored, receipt)
        return stored

    def _receipt_uri(self, kind: str, task: str) -> str:
        return self.path(kind, "receipts", f"{task}.json")

    def put_manifest(self, manifest: Manifest) -> Manifest:
        """Make the artifact visible; the first manifest is kept, and returned."""
        place = about(self.path(manifest.kind, manifest.fingerprint))
        content = asdict(manifest)
        part_list = None
        if len(manifest.parts) > _MAX_INLINE_PARTS:
            rows = parquet_bytes(pa.Table.from_pylist(content.pop("parts")))
            part_list = create_or_adopt(join(place, PART_LIST), rows)
            content["parts_sha256"] = sha256(part_list)
        uri = join(place, MANIFEST)
        data = create_or_adopt(uri, seal(content, indent=1))
        stored = parse_manifest(data, place, manifest.kind, part_list)
        _check_same(uri, stored, manifest)
        return stored

    def get_manifest(self, kind: str, fingerprint: str) -> Manifest:
        return load_manifest(self.path(kind, fingerprint), kind)

    def find_manifest(self, kind: str, fingerprint: str) -> Manifest | None:
        """The manifest, or None where the artifact does not exist or lost a part or file.

        An artifact of an older layout counts as missing: it is made again.
        """
        place = about(f"{kind}/{fingerprint}")
        try:
            data = read_bytes(self.path(place, MANIFEST))
        except FileNotFoundError:
            return None
        manifest = parse_manifest(data, self.path(place), kind)
        paths = [part.path for part in manifest.parts]
        paths += [f"{place}/{name}" for name in manifest.files]
        return None if self._missing(paths) else manifest


def _check_same(uri: str, stored: Receipt | Manifest, made: Receipt | Manifest) -> None:
    """A task that is repeated because a part was lost has to give the same bytes again."""
    before = {part.path: part.sha256 for part in stored.parts} | stored.files
    now = {part.path: part.sha256 for part in made.parts} | made.files
    different = sorted(path for path in now if now[path] != before.get(path, now[path]))
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
    """The URI of the folder that the manifest lies in, and the manifest; as `load_manifest`."""
    try:
        place, data = read_manifest(folder)
    except FileNotFoundError as error:
        raise ArtifactError(f"no artifact at {folder}: there is no {MANIFEST}") from error
    return place, parse_manifest(data, place, kind)


def parse_manifest(
    data: bytes, place: str, kind: str | None, part_list: bytes | None = None
) -> Manifest:
    """The manifest in `data`, of the folder `place`; `part_list` is its list of parts, if read."""
    try:
        content = unseal(data, join(place, MANIFEST))
        digest = content.pop("parts_sha256", None)
        rows = content["parts"] if digest is None else _listed_parts(place, digest, part_list)
        content["parts"] = tuple(PartRef(**row) for row in rows)
        manifest = Manifest(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{place}/{MANIFEST} is broken: {error}") from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{folder_about(place)} holds `{manifest.kind}` where `{kind}` is needed"
        )
    return manifest


def _listed_parts(place: str, digest: str, part_list: bytes | None) -> list[dict[str, Any]]:
    uri = join(place, PART_LIST)
    try:
        data = read_bytes(uri) if part_list is None else part_list
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
