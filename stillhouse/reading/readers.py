"""Reading results, without Ray: any artifact's parts, selections, distilled sets.

import stillhouse
selection = stillhouse.open_selection("store/runs/...")      # a run, an artifact or STORE#name
dataset = selection.to_datasets()
small = stillhouse.open_distilled("store/runs/...")
small.images, small.labels, small.learning_rate
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.storage import names
from stillhouse.storage.artifact import Manifest, Part, find_artifact, load_manifest
from stillhouse.storage.filesystem import (
    absolute_uri,
    exists,
    join,
    known_options,
    protocol_of,
    read_bytes,
)
from stillhouse.storage.parquet import open_part, read_table
from stillhouse.storage.run_record import read_json

if TYPE_CHECKING:
    from stillhouse.reading.torch_reader import SelectionDataset


@dataclass(frozen=True, slots=True)
class Sought:
    """A kind of artifact to open.

    Attributes:
        kind: its folder in the store.
        key: of a run's result, where its fingerprint is.
        noun, made_none: for messages.
    """

    kind: str
    key: str
    noun: str
    made_none: str


_SELECTION = Sought("selections", "selection_fingerprint", "a selection", "made no selection")
_DISTILLED = Sought("distilled", "distilled_fingerprint", "a distilled set", "distilled nothing")


class Artifact:
    """Any artifact.

    Attributes:
        uri: of its folder.
        about: URI of the folder of its manifest and other files.
        manifest: its settings, inputs and totals.
        store: URI of the store.
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
        return [part.under(self.store) for part in self.manifest.parts]

    @cached_property
    def tokens(self) -> Manifest:
        """The manifest of the tokens that a selection's rows are from; of other kinds their own.

        Raises:
            ArtifactError: they are no longer in the store.
        """
        if self.manifest.kind != "selections":
            return self.manifest
        return load_manifest(join(self.store, "tokens", self.manifest.inputs["tokens"]), "tokens")

    @property
    def num_rows(self) -> int:
        return self.manifest.num_rows

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    def to_datasets(self, *, streaming: bool = False) -> Any:
        """The rows as a Hugging Face `Dataset` (`IterableDataset` with `streaming`)."""
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


class Selection(Artifact):
    """A selection: the kept rows with their scores and addresses."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, "selections")

    @property
    def threshold(self) -> float:
        """The lowest score of a kept row."""
        return float(self.manifest.totals["threshold"])

    @property
    def sources(self) -> dict[str, dict[str, int]]:
        """`pool_tokens` and `kept_tokens` by source."""
        tally = self.manifest.totals["tally"]["sources"]
        return {
            name: {"pool_tokens": row["pool_tokens"], "kept_tokens": row["kept_tokens"]}
            for name, row in sorted(tally.items())
        }

    def to_arrow(self, columns: list[str] | None = None) -> pa.RecordBatchReader:
        """All rows as record batches, a row group each; `.read_all()` makes a table.

        Args:
            columns: to read; default all.

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
        """The origin of the `row`-th kept row: score, losses, token part and row, raw files."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of a selection that has {self.num_rows}")
        ends = np.cumsum([part.num_rows for part in self.parts])
        number = int(np.searchsorted(ends, row, side="right"))
        part = self.parts[number]
        start = int(ends[number]) - part.num_rows
        found: dict[str, Any] = read_table(part.uri).slice(row - start, 1).to_pylist()[0]
        files = part_files(self.tokens)[found["part"]]
        found.pop("input_ids", None)
        for piece in found.get("documents", []):
            piece["file"] = files[piece["file"]]["uri"]
        if "raw_file" in found:
            found["raw_file"] = files[found["raw_file"]]["uri"]
        return found | {"token_part": self.tokens.parts[found["part"]].path}


class Distilled(Artifact):
    """A distilled set as a network is trained on it.

    `to_datasets` has the stored rows: `image` (to look at), `label`, `values`; INFER's are real
    images, then compensators (`stored_sets`).

    Attributes:
        images: float32 [N, C, H, W], preprocessed.
        labels: classes int64 [N], indices into `class_names`.
        soft_labels: logits float32 [N, num_classes], or None.
        learning_rate: learned with the images, or None.
        preprocessing: `mean` and `std` [C] of pixels in [0, 1], or ZCA's `mean` [D], `matrix` and
            `inverse` [D, D] (`prepared.Zca`).
    """

    def __init__(self, uri: str) -> None:
        from safetensors.numpy import load

        from stillhouse.distillation.stored_sets import PREPROCESSING, read_set

        super().__init__(uri, "distilled")
        part = self.parts[0].uri
        found = read_set(read_table(part), part)
        self.images: NDArray[np.float32] = found.images.numpy()
        self.labels: NDArray[np.int64] = found.labels.numpy()
        soft = found.label_logits
        self.soft_labels: NDArray[np.float32] | None = None if soft is None else soft.numpy()
        self.learning_rate = found.learning_rate
        self.preprocessing: dict[str, NDArray[np.float32]] = load(
            read_bytes(join(self.about, PREPROCESSING))
        )

    @property
    def class_names(self) -> list[str]:
        return list(self.manifest.totals["class_names"])

    @property
    def num_bytes(self) -> int:
        """Stored bytes of images and labels, without the pictures to look at."""
        return int(self.manifest.totals["bytes"])

    @property
    def trained_by(self) -> dict[str, Any]:
        """How networks were trained on the set when it was evaluated.

        `recipe` (`recipes.Recipe`), DSA groups `augmentation`, kind of `labels`, `temperature` of
        soft ones, and with labels of views the seed of the views (`augment.epoch_views`). Empty for
        a set of an older version.
        """
        return dict(self.manifest.totals.get("trained_by", {}))

    def view_labels(self) -> NDArray[Any]:
        """Stored labels of views, [epochs, N, num_classes] logits or [epochs, N, 2] distances.

        Raises:
            ArtifactError: the set's labels are of its images.
        """
        from safetensors.numpy import load

        from stillhouse.distillation.stored_sets import LABELS

        if LABELS not in self.manifest.files:
            raise ArtifactError(f"{self.uri} has one label an image, none of views")
        return load(read_bytes(join(self.about, LABELS)))["labels"]


def part_files(tokens: Manifest) -> list[list[dict[str, Any]]]:
    """The raw files of each part of a tokens artifact."""
    return [unit["files"] for unit in tokens.inputs["units"] for _ in range(unit["parts"])]


def open_artifact(uri: str) -> Artifact:
    """Open any artifact by the URI of its folder.

    Raises:
        ArtifactError: there is none, or its manifest is broken or of a newer version.
    """
    return Artifact(uri)


def open_selection(uri: str) -> Selection:
    """Open a selection by the URI of its folder, of the run that made it, or `STORE#name`.

    Raises:
        ArtifactError: it does not exist, an unfinished run, or an artifact of another kind.
    """
    return Selection(find_folder(uri, _SELECTION))


def open_distilled(uri: str) -> Distilled:
    """Open a distilled set by the URI of its folder, of the run that made it, or `STORE#name`.

    Raises:
        ArtifactError: it does not exist, an unfinished run, or an artifact of another kind.
    """
    return Distilled(find_folder(uri, _DISTILLED))


def find_folder(uri: str, sought: Sought) -> str:
    """The folder of an artifact by its own URI, that of the run that made it, `STORE#name`, or
    `STORE#name@version`.

    Raises:
        ArtifactError: an unfinished run, a name that is not published, or one of another kind.
    """
    store, mark, name = uri.rpartition("#")
    if mark and "/" not in name:
        published = names.published(absolute_uri(store), name)
        if published.kind != sought.kind:
            raise ArtifactError(f"{uri} stands for one of `{published.kind}`, not {sought.noun}")
        return join(absolute_uri(store), sought.kind, published.selection)
    folder = absolute_uri(uri)
    if folder.rsplit("/", 2)[-2] != "runs":
        return folder
    result = read_json(folder, "result.json")
    if result is None:
        known = "the run is not finished" if exists(join(folder, "spec.yaml")) else "no run"
        raise ArtifactError(f"{folder}: {known} (see `stillhouse status {folder}`)")
    if sought.key not in result:
        raise ArtifactError(f"{folder} is a run of `job: {result['job']}`: it {sought.made_none}")
    return join(folder.rsplit("/", 2)[0], sought.kind, result[sought.key])
