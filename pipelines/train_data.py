"""What a training reads: selections, files of tokens, documents; and which tokenizer they have.

Everything here is looked at before any work: listings, manifests, footers and digests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from stillhouse.data_settings import DataSource
from stillhouse.errors import InputError, ModelError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.shape import model_uri, read_header
from stillhouse.pipelines.given import check_vocabulary, model_identity, selection_uri
from stillhouse.pipelines.inputs import Inputs, list_source, open_inputs
from stillhouse.reading.readers import Artifact, open_selection
from stillhouse.storage.artifact import Store, load_manifest
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import (
    FileInfo,
    absolute_uri,
    exists,
    join,
    list_names,
    open_read,
)
from stillhouse.storage.parquet import open_parquet
from stillhouse.text.tokenizer import BosSetting, load_tokenizer
from stillhouse.training.spec import FileData, SelectionData, TrainSpec

_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
TEXT_LENGTH = 256
"""Tokens a sequence, where neither spec nor data say."""


@dataclass(frozen=True, slots=True)
class TokenizerSeen:
    """The tokenizer that some tokens were made with; `folder` where it is known."""

    digest: str
    eos_token: str
    folder: str | None
    bos: BosSetting = "auto"


@dataclass(frozen=True, slots=True)
class TokenSet:
    """Parts of packed sequences, in order."""

    key: str
    name: str
    weight: float
    uris: tuple[str, ...]
    rows: tuple[int, ...]
    digests: tuple[str, ...]
    sequence_length: int
    tokenizer: TokenizerSeen | None

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return sum(self.rows)

    def identity(self) -> str:
        """Fingerprint of the content."""
        return fingerprint(["token set", self.digests, self.rows])


@dataclass(frozen=True, slots=True)
class TextSet:
    """Documents that are still to be tokenised."""

    key: str
    name: str
    weight: float
    inputs: Inputs

    def identity(self) -> str:
        """Fingerprint of content and of how it is read."""
        return self.inputs.identity()


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """All that a train job reads, by content."""

    datasets: tuple[TokenSet | TextSet, ...]
    heldout: TokenSet | TextSet | None
    tokenizer: TokenizerSeen
    """With a folder."""
    models: tuple[str, ...] = ()
    """Fingerprints of prior and conditional, where batches are chosen online."""

    @property
    def all(self) -> list[TokenSet | TextSet]:
        """Data sets, then the held-out."""
        return [*self.datasets, *([self.heldout] if self.heldout else [])]

    @property
    def sequence_length(self) -> int | None:
        """Of the token sets; None where all are documents."""
        return next((s.sequence_length for s in self.all if isinstance(s, TokenSet)), None)

    def identity(self) -> list[Any]:
        """Fingerprints of all inputs."""
        data = [s.identity() for s in self.all]
        return [data, self.tokenizer.digest, self.tokenizer.eos_token, *self.models]


Listing = dict[str, list[FileInfo]]
"""The files of a job, by key in the spec; none for selections and artifacts."""


def keyed_data(spec: TrainSpec) -> dict[str, SelectionData | FileData]:
    """The data sets and the held-out by their keys in the spec."""
    several = isinstance(spec.data, list)
    found = {f"data.{i}" if several else "data": item for i, item in enumerate(spec.datasets)}
    return found | ({"heldout": spec.heldout} if spec.heldout is not None else {})


def list_data(spec: TrainSpec) -> Listing:
    """List the files of a job.

    Raises:
        InputError: a path matches nothing. ArtifactError: no such selection.
    """
    listing: Listing = {}
    for key, item in keyed_data(spec).items():
        if isinstance(item, SelectionData):
            open_selection(selection_uri(Store(absolute_uri(spec.store)), item.selection))
            listing[key] = []
        else:
            listing[key] = [] if _artifact_at(item) else list_source(item)
    return listing


def open_data(store: Store, spec: TrainSpec, listing: Listing, *, remember: bool) -> TrainInputs:
    """Look at everything that a job reads.

    Raises:
        InputError: sequences of several lengths, or files that are neither tokens nor documents.
        ModelError: a tokenizer that the tokens were not made with. SpecError: none is known.
    """
    made = {
        key: _open(store, spec, key, item, listing[key], remember)
        for key, item in keyed_data(spec).items()
    }
    _check_lengths(spec, [s for s in made.values() if isinstance(s, TokenSet)])
    heldout = made.pop("heldout", None)
    sets = tuple(made.values())
    every = [*sets, *([heldout] if heldout else [])]
    tokenizer = _tokenizer(store, spec, every)
    if spec.online is not None:
        folder = str(tokenizer.folder)
        made = load_tokenizer(folder, tokenizer.eos_token)
        check_vocabulary(made, folder, given_paths(spec))
    return TrainInputs(sets, heldout, tokenizer, _models(store, spec, remember))


def _models(store: Store, spec: TrainSpec, remember: bool) -> tuple[str, ...]:
    """Fingerprints of prior and conditional."""
    folders = {key: model_uri(path) for key, path in given_paths(spec).items()}
    for key, folder in folders.items():
        read_header(folder, f"{key} {folder!r}")
    return tuple(model_identity(store, f, remember=remember) for f in folders.values())


def given_paths(spec: TrainSpec) -> dict[str, str]:
    """The models that a spec gives by path, by their keys."""
    online = spec.online
    if online is None:
        return {}
    return {"online.prior": online.prior.path, "online.conditional": online.conditional.path}


def _open(
    store: Store,
    spec: TrainSpec,
    key: str,
    item: SelectionData | FileData,
    files: list[FileInfo],
    remember: bool,
) -> TokenSet | TextSet:
    if isinstance(item, SelectionData):
        selection = open_selection(selection_uri(store, item.selection))
        return _of_artifact(store, spec, key, item, selection, remember)
    folder = _artifact_at(item)
    if folder is not None:
        return _of_artifact(store, spec, key, item, Artifact(folder), remember)
    name = item.source or PurePosixPath(item.paths[0].rstrip("/")).stem.strip("*") or key
    length = _token_length(files[0].uri)
    if length is None:
        inputs = open_inputs(store, item, files, spec.part_tokens, remember=remember)
        return TextSet(key, name, item.weight, inputs)
    digests = digest_files(store, files, remember=remember)
    return TokenSet(
        key=key,
        name=name,
        weight=item.weight,
        uris=tuple(file.uri for file in files),
        rows=tuple(sum(digest.row_group_rows or ()) for digest in digests),
        digests=tuple(digest.sha256 for digest in digests),
        sequence_length=length,
        tokenizer=None,
    )


def _artifact_at(item: FileData) -> str | None:
    """The folder of an artifact, where the path is one."""
    folder = absolute_uri(item.paths[0])
    return folder if len(item.paths) == 1 and exists(join(folder, "manifest.json")) else None


def _of_artifact(
    store: Store,
    spec: TrainSpec,
    key: str,
    item: SelectionData | FileData,
    artifact: Artifact,
    remember: bool,
) -> TokenSet | TextSet:
    parts = artifact.parts
    if not parts:
        raise InputError(f"`{key}`: {artifact.uri} is empty: it has no parts")
    length = _token_length(parts[0].uri)
    if length is None:  # documents that were selected whole
        source = DataSource(path=[part.uri for part in parts], format="parquet")
        inputs = open_inputs(
            store, source, list_source(source), spec.part_tokens, remember=remember
        )
        return TextSet(key, "selection", item.weight, inputs)
    return TokenSet(
        key=key,
        name="selection",
        weight=item.weight,
        uris=tuple(part.uri for part in parts),
        rows=tuple(part.num_rows for part in parts),
        digests=tuple(part.sha256 for part in parts),
        sequence_length=length,
        tokenizer=_tokenizer_of(artifact),
    )


def _token_length(uri: str) -> int | None:
    """T of a Parquet file with a column `input_ids`; None for anything else.

    Raises:
        InputError: `input_ids` that are no lists of integers, or of several lengths.
    """
    if not uri.lower().endswith((".parquet", ".pq")):
        return None
    try:
        with open_read(uri) as stream:
            file = open_parquet(stream)
            if "input_ids" not in file.schema_arrow.names:
                return None
            kind = file.schema_arrow.field("input_ids").type
            if not isinstance(kind, _LISTS) or not pa.types.is_integer(kind.value_type):
                raise InputError(f"{uri}: `input_ids` is {kind}, not lists of integers")
            if pa.types.is_fixed_size_list(kind):
                return kind.list_size
            if not file.metadata.num_rows:
                raise InputError(f"{uri} has no rows: remove it")
            first = file.read_row_group(0, columns=["input_ids"])["input_ids"].combine_chunks()
            lengths = np.unique(first.value_lengths().drop_null().to_numpy())
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} is not a Parquet file: {error}") from error
    if first.null_count:
        raise InputError(f"{uri}: {first.null_count} rows have no `input_ids`: remove them")
    if len(lengths) != 1:
        raise InputError(
            f"{uri}: sequences of {lengths.min()} to {lengths.max()} tokens: pack them to one T"
        )
    return int(lengths[0])


def _check_lengths(spec: TrainSpec, sets: Sequence[TokenSet]) -> None:
    wanted = spec.sequence_length or (sets[0].sequence_length if sets else None)
    for found in sets:
        if found.sequence_length != wanted:
            place = "`sequence_length`" if spec.sequence_length else f"`{sets[0].key}`"
            raise InputError(
                f"`{found.key}` has sequences of {found.sequence_length} tokens, {place} of "
                f"{wanted}"
            )


def _tokenizer_of(artifact: Artifact) -> TokenizerSeen | None:
    """The tokenizer of a selection or tokens artifact."""
    manifest = artifact.manifest
    if manifest.kind == "selections":
        manifest = load_manifest(join(artifact.store, "tokens", manifest.inputs["tokens"]))
    settings = manifest.settings["tokenizer"]
    folder = _find_tokenizer(Store(artifact.store), settings["digest"], settings["eos_token"])
    return TokenizerSeen(settings["digest"], settings["eos_token"], folder)


def _find_tokenizer(store: Store, digest: str, eos_token: str) -> str | None:
    """The folder of a store's tokenizer with this content."""
    for name in list_names(store.path("models")):
        manifest = store.find_manifest("models", name)
        if manifest is not None and manifest.totals.get("role") == "tokenizer":
            same = manifest.totals["digest"], manifest.totals["eos_token"]
            if same == (digest, eos_token):
                return store.path("models", name)
    return None


def _tokenizer(store: Store, spec: TrainSpec, sets: Sequence[TokenSet | TextSet]) -> TokenizerSeen:
    """The tokenizer of the spec, or of the data; all that is known of has to be the same."""
    seen = {s.key: s.tokenizer for s in sets if isinstance(s, TokenSet) and s.tokenizer}
    if spec.tokenizer is not None:
        given = load_tokenizer(spec.tokenizer.path, spec.tokenizer.eos_token)
        asked = spec.tokenizer
        chosen = TokenizerSeen(given.digest, given.eos_token, asked.path, asked.bos)
        place = f"`tokenizer.path: {spec.tokenizer.path}`"
    else:
        known = [(key, one) for key, one in seen.items() if one.folder is not None]
        if not known:
            raise SpecError(
                "`tokenizer` is missing: the data do not tell which one they were made with"
            )
        place, chosen = f"`{known[0][0]}`", known[0][1]
    for key, other in seen.items():
        if (other.digest, other.eos_token) != (chosen.digest, chosen.eos_token):
            raise ModelError(
                f"`{key}` was made with the tokenizer {other.digest[:12]} ({other.eos_token}), "
                f"{place} is {chosen.digest[:12]} ({chosen.eos_token}): give the one that the "
                "tokens were made with, or leave `tokenizer` out"
            )
    return chosen
