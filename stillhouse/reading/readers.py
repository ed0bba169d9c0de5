"""Reading results, without Ray: any artifact's parts, and selections as Arrow, datasets or torch.

import stillhouse
selection = stillhouse.open_selection("store/runs/...")      # a run, an artifact or STORE#name
dataset = selection.to_datasets()
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stillhouse.errors import ArtifactError
from stillhouse.storage import names
from stillhouse.storage.artifact import Manifest, Part, find_artifact, load_manifest
from stillhouse.storage.filesystem import (
    absolute_uri,
    exists,
    join,
    protocol_of,
)
from stillhouse.storage.parquet import open_part, read_table
from stillhouse.storage.run_record import read_json
from stillhouse.storage.store_options import known_options

if TYPE_CHECKING:
    from stillhouse.reading.torch_reader import SelectionDataset


@dataclass(frozen=True, slots=True)
class Sought:
    """What people mean by a URI: a kind of artifact, the key of a run's result that names one, and
    the words of messages.
    """

    kind: str
    key: str
    noun: str
    made_none: str


_SELECTION = Sought("selections", "selection_fingerprint", "a selection", "made no selection")


class Artifact:
    """Any artifact: its manifest, its parts in order, and `about`, the URI of the folder in which
    the manifest and its other files lie.
    """

    def __init__(self, uri: str, kind: str | None = None) -> None:
        self.uri = absolute_uri(uri)
        self.about, self.manifest = find_artifact(self.uri, kind)
        self.store = self.uri.rsplit("/", 2)[0]

    def __repr__(self) -> str:
        name = type(self).__name__
        kind = f", kind={self.manifest.kind!r}" if name == "Artifact" else ""
        counts = f"rows={self.num_rows:,}, tokens={self.num_tokens:,}, parts={len(self.parts):,}"
        return f"{name}({self.uri!r}{kind}, {counts})"

    @property
    def parts(self) -> list[Part]:
        """The parts in order."""
        return [
            Part(join(self.store, p.path), p.num_rows, p.num_tokens, p.num_bytes, p.sha256)
            for p in self.manifest.parts
        ]

    @property
    def num_rows(self) -> int:
        """Rows over all parts."""
        return self.manifest.num_rows

    @property
    def num_tokens(self) -> int:
        """Tokens over all parts."""
        return self.manifest.num_tokens


class Selection(Artifact):
    """A selection: the kept rows with their scores and addresses."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, "selections")

    @property
    def threshold(self) -> float:
        """Score of the worst kept row."""
        return float(self.manifest.totals["threshold"])

    @property
    def sources(self) -> dict[str, dict[str, int]]:
        """By source: `pool_tokens` and `kept_tokens`."""
        tally = self.manifest.totals["tally"]["sources"]
        return {
            name: {"pool_tokens": row["pool_tokens"], "kept_tokens": row["kept_tokens"]}
            for name, row in sorted(tally.items())
        }

    def to_arrow(self, columns: list[str] | None = None) -> pa.RecordBatchReader:
        """All rows as a stream of record batches (`.read_all()` makes a table), a row group each.

        Args:
            columns: read only these.

        Raises:
            ArtifactError: the selection has no parts. KeyError: no such column.
        """
        parts = self.parts
        if not parts:
            raise ArtifactError(f"{self.uri} is empty: it has no parts")
        with open_part(parts[0].uri) as first:
            schema = first.schema_arrow
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        return pa.RecordBatchReader.from_batches(schema, self._batches(columns))

    def _batches(self, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        for part in self.parts:
            with open_part(part.uri) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=columns, use_threads=False)
                    yield from table.combine_chunks().to_batches()

    def to_datasets(self, *, streaming: bool = False) -> Any:
        """A Hugging Face `Dataset` (`IterableDataset` with `streaming`)."""
        import datasets

        files = [
            glob.escape(part.uri) if protocol_of(part.uri) == "file" else part.uri
            for part in self.parts
        ]
        return datasets.load_dataset(
            "parquet",
            data_files=files,
            split="train",
            streaming=streaming,
            storage_options=known_options(self.uri) or None,
        )

    def to_torch(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        batch_size: int | None = None,
        drop_last: bool = False,
    ) -> "SelectionDataset":
        """A torch `IterableDataset` of `{"input_ids": int64 [T]}` (`[B, T]` with `batch_size`).

        The order is fixed by (seed, epoch). Ranks have equally many rows or one more; with
        `drop_last` they have equally many, whole batches, and `dropped_rows` counts the rest.

        Raises:
            ArtifactError: the selection keeps documents, which are text.
        """
        from stillhouse.reading.torch_reader import SelectionDataset

        if self.manifest.settings.get("grain") == "documents":
            raise ArtifactError(
                f"{self.uri} keeps documents (`selection.grain: documents`), which are text and no "
                "tokens: read them with `to_datasets()` or `to_arrow()`, or train on them with "
                "`job: train`"
            )
        order = (rank, world_size, seed, epoch)
        return SelectionDataset(self.parts, *order, batch_size, drop_last)

    def provenance(self, row: int) -> dict[str, Any]:
        """Where the `row`-th kept row comes from: score, losses, token part and row, raw files."""
        found = self._row(row)
        tokens = load_manifest(join(self.store, "tokens", self.manifest.inputs["tokens"]), "tokens")
        files = part_files(tokens)[found["part"]]
        found.pop("input_ids", None)
        for piece in found.get("documents", []):
            piece["file"] = files[piece["file"]]["uri"]
        if "raw_file" in found:
            found["raw_file"] = files[found["raw_file"]]["uri"]
        return found | {"token_part": tokens.parts[found["part"]].path}

    def _row(self, row: int) -> dict[str, Any]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of a selection that has {self.num_rows}")
        for part in self.parts:
            if row < part.num_rows:
                return read_table(part.uri).slice(row, 1).to_pylist()[0]
            row -= part.num_rows
        raise AssertionError("unreachable")


def part_files(tokens: Manifest) -> list[list[dict[str, Any]]]:
    """The raw files of each part of a tokens artifact (of the unit it was packed from)."""
    return [unit["files"] for unit in tokens.inputs["units"] for _ in range(unit["parts"])]


def open_artifact(uri: str) -> Artifact:
    """Open any artifact by the URI of its folder.

    Raises:
        ArtifactError: there is none, or its manifest is broken or newer than this version.
    """
    return Artifact(uri)


def open_selection(uri: str) -> Selection:
    """Open a selection by the URI of its folder, of the run that made it, or `STORE#name`.

    Raises:
        ArtifactError: nothing there, an unfinished run, or an artifact of another kind.
    """
    return Selection(find_folder(uri, _SELECTION))


def find_folder(uri: str, sought: Sought) -> str:
    """The folder of what is sought: at its own URI, that of the run that made it, or `STORE#name`.

    Raises:
        ArtifactError: nothing there, an unfinished run, or a name or run of another kind.
    """
    store, mark, name = uri.rpartition("#")
    if mark and "/" not in name:
        published = names.current(absolute_uri(store), name)
        if published is None:
            raise ArtifactError(f"nothing is published under {name!r} in {store}")
        if published.kind != sought.kind:
            raise ArtifactError(f"{uri} stands for one of `{published.kind}`, not {sought.noun}")
        return join(absolute_uri(store), sought.kind, published.selection)
    folder = absolute_uri(uri)
    return _made_by_run(folder, sought) if folder.rsplit("/", 2)[-2] == "runs" else folder


def _made_by_run(folder: str, sought: Sought) -> str:
    result = read_json(folder, "result.json")
    if result is None:
        known = "the run is not finished" if exists(join(folder, "spec.yaml")) else "no run"
        raise ArtifactError(f"{folder}: {known} (see `stillhouse status {folder}`)")
    if sought.key not in result:
        raise ArtifactError(f"{folder} is a run of `job: {result['job']}`: it {sought.made_none}")
    return join(folder.rsplit("/", 2)[0], sought.kind, result[sought.key])
