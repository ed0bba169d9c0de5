"""What a training reads: selections, files of tokens, documents; and which tokenizer they have.

Everything here is looked at before any work: listings, manifests, footers and digests.
"""

import json
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from stillhouse.custom_code import CustomCode, find_named
from stillhouse.data_settings import DataSource
from stillhouse.errors import ArtifactError, InputError, ModelError, SpecError
from stillhouse.models.shape import model_uri, read_header
from stillhouse.pipelines.given import check_vocabulary, model_identity
from stillhouse.pipelines.inputs import Inputs, list_source, open_inputs
from stillhouse.reading.readers import Artifact
from stillhouse.storage.artifact import Store, load_manifest
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import (
    FileInfo,
    absolute_uri,
    exists,
    join,
    list_names,
)
from stillhouse.text.tokenizer import BosSetting, load_tokenizer
from stillhouse.training.files import columns_of, prompt_columns, token_length
from stillhouse.training.spec import OBJECTIVES, FileData, SelectionData, TrainSpec
from stillhouse.training.task import (
    CHECKPOINTS,
    LOSS_MASK,
    TokenSet,
    checkpoints_of,
    token_set,
)

HELDOUT, INIT = "heldout", "init"
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
class TextSet:
    """Documents that are still to be tokenised."""

    name: str
    weight: float
    inputs: Inputs

    def identity(self) -> str:
        """Fingerprint of content and of how it is read."""
        return self.inputs.identity()


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """All that a train job reads, by content.

    Attributes:
        sets: the data sets, then the held-out, by their keys in the spec.
        tokenizer: with a folder; None where it is to be trained on the documents.
        models: fingerprints of those that are given.
        code: of an objective that is the user's.
    """

    sets: dict[str, TokenSet | TextSet]
    tokenizer: TokenizerSeen | None
    models: tuple[str, ...] = ()
    code: CustomCode | None = None

    @property
    def datasets(self) -> list[TokenSet | TextSet]:
        """Those that are trained on."""
        return [one for key, one in self.sets.items() if key != HELDOUT]

    @property
    def sequence_length(self) -> int | None:
        """Of the token sets; None where all are documents."""
        found = (s.sequence_length for s in self.sets.values() if isinstance(s, TokenSet))
        return next(found, None)

    def identity(self) -> list[Any]:
        """Fingerprints of all inputs."""
        data = [s.identity() for s in self.sets.values()]
        words = self.tokenizer
        tokenizer = ["trained"] if words is None else [words.digest, words.eos_token]
        code = [] if self.code is None else [self.code.digest]
        return [data, *tokenizer, *self.models, *code]


Listing = dict[str, list[FileInfo]]
"""The files of a job, by key in the spec; none for selections and artifacts."""


def keyed_data(spec: TrainSpec) -> dict[str, SelectionData | FileData]:
    """The data sets and the held-out by their keys in the spec."""
    several = isinstance(spec.data, list)
    found = {f"data.{i}" if several else "data": item for i, item in enumerate(spec.datasets)}
    return found | ({HELDOUT: spec.heldout} if spec.heldout is not None else {})


def list_data(spec: TrainSpec) -> Listing:
    """List the files of a job.

    Raises:
        InputError: a path matches nothing. ArtifactError: no such selection.
    """
    listing: Listing = {}
    for key, item in keyed_data(spec).items():
        if isinstance(item, SelectionData):
            _rows_of(item)
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
    seen: dict[str, TokenizerSeen] = {}
    opener = _Opener(store, spec, remember, seen)
    sets = {key: opener.open(key, one, listing[key]) for key, one in keyed_data(spec).items()}
    _check_lengths(spec, {key: s for key, s in sets.items() if isinstance(s, TokenSet)})
    models = _models(store, spec, remember)
    tokenizer = _tokenizer(spec, seen)
    if tokenizer is not None and models:
        folder = str(tokenizer.folder)
        made = load_tokenizer(folder, tokenizer.eos_token)
        check_vocabulary(made, folder, given_paths(spec))
    return TrainInputs(sets, tokenizer, models, own_objective(spec))


def own_objective(spec: TrainSpec) -> CustomCode | None:
    """The code of an objective in a folder of the user's.

    Raises:
        SpecError: as `find_named`.
    """
    name = spec.train.objective.name
    return None if name in OBJECTIVES else find_named("train.objective.name", name)


def _models(store: Store, spec: TrainSpec, remember: bool) -> tuple[str, ...]:
    """Fingerprints of the models that a spec gives."""
    folders = {key: model_uri(path) for key, path in given_paths(spec).items()}
    for key, folder in folders.items():
        config = json.loads(read_header(folder, f"{key} {folder!r}").config)
        kind = config.get("model_type")
        if config.get("is_encoder_decoder"):
            raise ModelError(
                f"{key} {folder!r} is an encoder-decoder ({kind}): `job: train` trains decoders; "
                "`job: mix` trains both (`model.kind`)"
            )
    if spec.init is not None:
        moments_of(store, spec, folders[INIT])
    return tuple(model_identity(store, f, remember=remember) for f in folders.values())


def given_paths(spec: TrainSpec) -> dict[str, str]:
    """The models that a spec gives, by their keys."""
    given = {INIT: spec.init} if spec.init else {}
    if spec.online is not None:
        online = spec.online
        given |= {"online.prior": online.prior, "online.conditional": online.conditional}
    return {key: str(one.path) for key, one in given.items()}


def moments_of(store: Store, spec: TrainSpec, folder: str) -> str | None:
    """Name of the checkpoints with the moments that `init.optimizer: keep` asks for; else None.

    Raises:
        ModelError: no training of this store made the model, or its checkpoints are gone.
    """
    if spec.init is None or spec.init.optimizer == "fresh":
        return None
    name = checkpoints_of(folder.rsplit("/", 1)[-1])
    inside = folder.startswith(store.path("models") + "/")
    if not inside or not any(n.isdigit() for n in list_names(store.path(CHECKPOINTS, name))):
        raise ModelError(
            f"`init.optimizer: keep`: {folder} has no checkpoints in {store.uri}: they stay for "
            "models that `job: train` made there with `train.keep_last` above 0, until a prune"
        )
    return name


@dataclass(frozen=True, slots=True)
class _Opener:
    """Opens data sets; what their tokens were made with is noted in `seen`, by key."""

    store: Store
    spec: TrainSpec
    remember: bool
    seen: dict[str, TokenizerSeen]

    def open(
        self, key: str, item: SelectionData | FileData, files: list[FileInfo]
    ) -> TokenSet | TextSet:
        """A data set."""
        if isinstance(item, SelectionData):
            return self._artifact(key, item, _rows_of(item))
        folder = _artifact_at(item)
        if folder is not None:
            return self._artifact(key, item, Artifact(folder))
        name = item.source or PurePosixPath(item.paths[0].rstrip("/")).stem.strip("*") or key
        length = None if ":" in item.format else token_length(files[0].uri)
        if length is None:
            columns = prompt_columns(item, files[0].uri)
            return self._texts(name, item, item.model_copy(update={"columns": columns}), files)
        digests = digest_files(self.store, files, remember=self.remember)
        return TokenSet(
            name=name,
            weight=item.weight,
            uris=tuple(file.uri for file in files),
            rows=tuple(sum(digest.row_group_rows or ()) for digest in digests),
            digests=tuple(digest.sha256 for digest in digests),
            sequence_length=length,
            masked=LOSS_MASK in columns_of(files[0].uri),
        )

    def _artifact(
        self, key: str, item: SelectionData | FileData, artifact: Artifact
    ) -> TokenSet | TextSet:
        parts = artifact.parts
        if not parts:
            raise InputError(f"`{key}`: {artifact.uri} is empty: it has no parts")
        if token_length(parts[0].uri) is None:  # documents that were selected whole
            source = DataSource(path=[part.uri for part in parts], format="parquet")
            return self._texts("selection", item, source, list_source(source))
        self.seen[key] = _tokenizer_of(artifact)
        made = token_set(Store(artifact.store), artifact.manifest, "selection", item.weight)
        return replace(made, masked=LOSS_MASK in columns_of(parts[0].uri))

    def _texts(
        self,
        name: str,
        item: SelectionData | FileData,
        source: DataSource,
        files: list[FileInfo],
    ) -> TextSet:
        size = self.spec.part_tokens
        inputs = open_inputs(self.store, source, files, size, remember=self.remember)
        return TextSet(name, item.weight, inputs)


def _rows_of(item: SelectionData) -> Artifact:
    """The selection, or tokens, that a spec names.

    Raises:
        ArtifactError: there is none, or it is of another kind.
    """
    found = Artifact(item.from_)
    if found.manifest.kind not in {"selections", "tokens"}:
        raise ArtifactError(
            f"{found.uri} holds `{found.manifest.kind}` where `selections` or `tokens` are needed"
        )
    return found


def _artifact_at(item: FileData) -> str | None:
    """The folder of an artifact, where the path is one."""
    folder = absolute_uri(item.paths[0])
    return folder if len(item.paths) == 1 and exists(join(folder, "manifest.json")) else None


def _check_lengths(spec: TrainSpec, sets: dict[str, TokenSet]) -> None:
    lengths = {"sequence_length": spec.sequence_length} if spec.sequence_length else {}
    lengths |= {key: found.sequence_length for key, found in sets.items()}
    place, wanted = next(iter(lengths.items()), ("", None))
    for key, found in sets.items():
        if found.sequence_length != wanted:
            raise InputError(
                f"`{key}` has sequences of {found.sequence_length} tokens, `{place}` of {wanted}"
            )


def _tokenizer_of(artifact: Artifact) -> TokenizerSeen:
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


def _tokenizer(spec: TrainSpec, seen: dict[str, TokenizerSeen]) -> TokenizerSeen | None:
    """The tokenizer of the spec, of the data, or of `init`; None for one that is to be trained.

    All that is known of has to be the same.
    """
    if spec.tokenizer is not None and spec.tokenizer.train is not None:
        if seen:
            raise SpecError(
                f"`tokenizer.train`: `{next(iter(seen))}` is tokens already: leave `tokenizer` out"
            )
        return None
    if spec.tokenizer is not None:
        asked = spec.tokenizer
        chosen, place = _loaded(str(asked.path), asked.eos_token, asked.bos), "`tokenizer.path`"
    elif spec.init is not None and not any(one.folder for one in seen.values()):
        chosen, place = _loaded(str(spec.init.path), None, "auto"), "that of `init`"
    else:
        known = [(key, one) for key, one in seen.items() if one.folder is not None]
        if not known:
            raise SpecError(
                "`tokenizer` is missing: the data do not tell which one they were made with"
            )
        place, chosen = f"`{known[0][0]}`", known[0][1]
    return _agreeing(chosen, place, seen)


def _loaded(path: str, eos_token: str | None, bos: BosSetting) -> TokenizerSeen:
    made = load_tokenizer(path, eos_token)
    return TokenizerSeen(made.digest, made.eos_token, path, bos)


def _agreeing(chosen: TokenizerSeen, place: str, seen: dict[str, TokenizerSeen]) -> TokenizerSeen:
    for key, other in seen.items():
        if (other.digest, other.eos_token) != (chosen.digest, chosen.eos_token):
            raise ModelError(
                f"`{key}` was made with the tokenizer {other.digest[:12]} ({other.eos_token}), "
                f"{place} is {chosen.digest[:12]} ({chosen.eos_token}): give the one that the "
                "tokens were made with, or leave `tokenizer` out"
            )
    return chosen
