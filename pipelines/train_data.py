"""A training's data before any work: selections, files of tokens, documents, and their tokenizer.

Only listings, manifests, footers and digests are read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from stillhouse.custom_code import CustomCode, find_named
from stillhouse.data_settings import ColumnNames, DataSource
from stillhouse.errors import ArtifactError, InputError, ModelError, SpecError
from stillhouse.models.shape import ModelHeader, model_uri, read_header
from stillhouse.pipelines.given import check_vocabulary, model_identity
from stillhouse.pipelines.inputs import Inputs, list_source, open_inputs
from stillhouse.pipelines.token_files import columns_of, token_length
from stillhouse.reading.readers import Artifact
from stillhouse.reading.tokenizer_of import tokenizer_of
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import (
    FileInfo,
    absolute_uri,
    exists,
    join,
    list_names,
)
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.text.records import read_records
from stillhouse.text.tokenizer import BosSetting, load_tokenizer
from stillhouse.training.data_spec import FileData, SelectionData
from stillhouse.training.schedule import Share
from stillhouse.training.spec import OBJECTIVES, OF_MASKED, TrainSpec
from stillhouse.training.task import CHECKPOINTS, TokenSet, checkpoints_of, token_set

HELDOUT, INIT, TEACHER = "heldout", "init", "train.objective.teachers."
TEXT_LENGTH = 256
"""Tokens of a sequence, if neither spec nor data say."""
_PAIRS = (("prompt", "completion"), ("instruction", "response"), ("input", "target"))
"""Common names of prompt and answer, the last those of the tasks of `job: mix`."""
_MAX_CHARS = 10_000_000


@dataclass(frozen=True, slots=True)
class KnownTokenizer:
    """The tokenizer that some tokens were made with; `folder` if it was found."""

    digest: str
    eos_token: str
    folder: str | None
    bos: BosSetting = "auto"
    chat: str | None = None


@dataclass(frozen=True, slots=True)
class TextSet:
    """Documents to be tokenised."""

    name: str
    share: Share
    inputs: Inputs

    def identity(self) -> str:
        return self.inputs.identity()


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """All that a train job reads, by content.

    Attributes:
        sets: the data sets, then the held-out set, by their keys in the spec.
        tokenizer: with a folder; None if it is to be trained on the documents.
        models: fingerprints of the given ones.
        code: of a user's objective.
    """

    sets: dict[str, TokenSet | TextSet]
    tokenizer: KnownTokenizer | None
    models: tuple[str, ...] = ()
    code: CustomCode | None = None

    @property
    def datasets(self) -> list[TokenSet | TextSet]:
        """The sets to train on."""
        return [one for key, one in self.sets.items() if key != HELDOUT]

    @property
    def sequence_length(self) -> int | None:
        """Of the token sets; None if all are documents."""
        lengths = (s.sequence_length for s in self.sets.values() if isinstance(s, TokenSet))
        return next(lengths, None)

    def identity(self) -> list[Any]:
        """Fingerprints of all inputs."""
        data, given = [s.identity() for s in self.sets.values()], self.tokenizer
        tokenizer = ["trained"] if given is None else [given.digest, given.eos_token]
        if given is not None and given.chat is not None:
            tokenizer.append(given.chat)
        code = [] if self.code is None else [self.code.digest]
        return [data, *tokenizer, *self.models, *code]


Listing = dict[str, list[FileInfo]]
"""Files by key in the spec; none for selections and artifacts."""


def keyed_data(spec: TrainSpec) -> dict[str, SelectionData | FileData]:
    """The data sets and the held-out set by their keys in the spec."""
    several = isinstance(spec.data, list)
    data = {f"data.{i}" if several else "data": item for i, item in enumerate(spec.datasets)}
    return data | ({HELDOUT: spec.heldout} if spec.heldout is not None else {})


def list_data(spec: TrainSpec) -> Listing:
    """List the files of a job.

    Raises:
        InputError: a path matches nothing. ArtifactError: no such selection.
    """
    listing: Listing = {}
    for key, item in keyed_data(spec).items():
        if isinstance(item, SelectionData):
            _sequences(item)
            listing[key] = []
        else:
            listing[key] = [] if artifact_at(item) else list_source(item)
    return listing


def open_data(store: Store, spec: TrainSpec, listing: Listing, *, remember: bool) -> TrainInputs:
    """Read footers, manifests and digests of everything that a job reads.

    Raises:
        InputError: sequences of several lengths, or files that are neither tokens nor documents.
        ModelError: a tokenizer that the tokens were not made with. SpecError: none is known.
    """
    opener = _Opener(store, spec, remember)
    sets = {key: opener.open(key, one, listing[key]) for key, one in keyed_data(spec).items()}
    lengths = {"sequence_length": spec.sequence_length} if spec.sequence_length else {}
    lengths |= {key: s.sequence_length for key, s in sets.items() if isinstance(s, TokenSet)}
    for key, length in lengths.items():
        place, wanted = next(iter(lengths.items()))
        if length != wanted:
            raise InputError(f"`{key}` has sequences of {length} tokens, `{place}` of {wanted}")
    models = _models(store, spec, remember)
    tokenizer = _tokenizer(spec, opener.tokenizers)
    if tokenizer is not None and models:
        folder = str(tokenizer.folder)
        made = load_tokenizer(folder, tokenizer.eos_token)
        check_vocabulary(made, folder, given_paths(spec))
        if made.mask_id is None and spec.init and _header(INIT, str(spec.init.path)).masked:
            raise ModelError(
                f"the tokenizer {folder!r} has no mask token, which `init` is trained with: set "
                "`mask_token` in its tokenizer_config.json"
            )
    return TrainInputs(sets, tokenizer, models, own_objective(spec))


def own_objective(spec: TrainSpec) -> CustomCode | None:
    """The code of an objective in the user's folder.

    Raises:
        SpecError: as `find_named`.
    """
    name = spec.train.objective.name
    return None if name in OBJECTIVES else find_named("train.objective.name", name)


def _models(store: Store, spec: TrainSpec, remember: bool) -> tuple[str, ...]:
    """Fingerprints of the given models."""
    folders = {key: model_uri(path) for key, path in given_paths(spec).items()}
    headers = {key: _header(key, folder) for key, folder in folders.items()}
    for key, folder in folders.items():
        config = json.loads(headers[key].config)
        kind = config.get("model_type")
        if config.get("is_encoder_decoder"):
            raise ModelError(
                f"{key} {folder!r} is an encoder-decoder ({kind}): `job: train` trains decoders; "
                "`job: mix` trains both (`model.kind`)"
            )
    _check_masked(spec, headers)
    if spec.init is not None:
        moments_of(store, spec, folders[INIT])
    return tuple(model_identity(store, f, remember=remember) for f in folders.values())


def _header(key: str, path: str) -> ModelHeader:
    return read_header(model_uri(path), f"{key} {path!r}")


def _check_masked(spec: TrainSpec, headers: Mapping[str, ModelHeader]) -> None:
    """Refuse what only causal, or only masked language models can do.

    Raises:
        SpecError: an objective, or another section, that does not go with `init`.
        ModelError: models of both kinds.
    """
    name, masked = spec.train.objective.name, INIT in headers and headers[INIT].masked
    for key, header in headers.items():
        if key.startswith("online."):
            header.check_causal()
        elif header.masked != masked:
            kinds = ("a masked", "a causal") if header.masked else ("a causal", "a masked")
            raise ModelError(
                f"{header.what} is {kinds[0]} language model, the one that is trained {kinds[1]} "
                "one: a teacher is of its student's kind"
            )
    if not masked and name == "masked_tokens":
        raise SpecError(
            f"`train.objective: masked_tokens` trains masked language models, {headers[INIT].what} "
            "is a causal one: leave `objective` out"
        )
    if masked and name in OBJECTIVES and name not in OF_MASKED:
        raise SpecError(
            f"`train.objective: {name}` trains causal language models, {headers[INIT].what} is a "
            f"masked one: use one of {', '.join(OF_MASKED)}"
        )
    others = {"lora": spec.lora, "train.select: online": spec.online, "evaluate": spec.evaluate}
    for key, asked in others.items():
        if masked and asked is not None:
            raise SpecError(
                f"`{key}` needs a causal language model, {headers[INIT].what} is masked"
            )


def given_paths(spec: TrainSpec) -> dict[str, str]:
    """Paths of the models that a spec gives, by key."""
    given = {INIT: spec.init} if spec.init else {}
    if (online := spec.online) is not None:
        given |= {"online.prior": online.prior, "online.conditional": online.conditional}
    given |= {f"{TEACHER}{i}": one for i, one in enumerate(spec.train.objective.teachers)}
    return {key: str(one.path) for key, one in given.items()}


def moments_of(store: Store, spec: TrainSpec, folder: str) -> str | None:
    """Name of the checkpoints with the optimiser's moments for `init.optimizer: keep`; else None.

    Raises:
        ModelError: the model was not trained in this store, or its checkpoints are gone.
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


class _Opener:
    """Opens data sets; `tokenizers`, by key, are those that their tokens were made with."""

    def __init__(self, store: Store, spec: TrainSpec, remember: bool) -> None:
        self._store, self._spec, self._remember = store, spec, remember
        self.tokenizers: dict[str, KnownTokenizer] = {}

    def open(
        self, key: str, item: SelectionData | FileData, files: list[FileInfo]
    ) -> TokenSet | TextSet:
        if isinstance(item, SelectionData):
            return self._artifact(key, item, _sequences(item))
        folder = artifact_at(item)
        if folder is not None:
            return self._artifact(key, item, Artifact(folder))
        name = item.label or key
        length = None if ":" in item.format else token_length(files[0].uri)
        if length is None:
            columns = prompt_columns(item, files[0].uri)
            return self._texts(name, item, item.model_copy(update={"columns": columns}), files)
        digests = digest_files(self._store, files, remember=self._remember)
        return TokenSet(
            name=name,
            share=item.share,
            uris=tuple(file.uri for file in files),
            rows=tuple(sum(digest.piece_rows or ()) for digest in digests),
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
            source = source.model_copy(update={"columns": prompt_columns(source, parts[0].uri)})
            kind = artifact.manifest.kind
            name = "selection" if kind == "selections" else kind
            return self._texts(name, item, source, list_source(source))
        known = tokenizer_of(artifact)
        self.tokenizers[key] = KnownTokenizer(known.digest, known.eos_token, known.folder)
        made = token_set(Store(artifact.store), artifact.manifest, "selection", item.share)
        return replace(made, masked=LOSS_MASK in columns_of(parts[0].uri))

    def _texts(
        self,
        name: str,
        item: SelectionData | FileData,
        source: DataSource,
        files: list[FileInfo],
    ) -> TextSet:
        size = self._spec.part_tokens
        inputs = open_inputs(self._store, source, files, size, remember=self._remember)
        return TextSet(name, item.share, inputs)


def _sequences(item: SelectionData) -> Artifact:
    """A selection or tokens.

    Raises:
        ArtifactError: missing, or of another kind.
    """
    artifact = Artifact(item.from_)
    kind = artifact.manifest.kind
    if kind not in {"selections", "tokens", "generated"}:
        raise ArtifactError(
            f"{artifact.uri} holds `{kind}` where `selections` or `tokens` are needed"
        )
    return artifact


def artifact_at(item: FileData) -> str | None:
    """The folder of the artifact that a path names, or None."""
    folder = absolute_uri(item.paths[0])
    return folder if len(item.paths) == 1 and exists(join(folder, "manifest.json")) else None


def _tokenizer(spec: TrainSpec, known: dict[str, KnownTokenizer]) -> KnownTokenizer | None:
    """The tokenizer of the spec, of the data, or of `init`; None for one that is to be trained.

    All known ones have to agree.
    """
    asked = spec.tokenizer
    if asked is not None and asked.train is not None:
        if known:
            raise SpecError(
                f"`tokenizer.train`: `{next(iter(known))}` is tokens already: leave `tokenizer` out"
            )
        return None
    found = [(key, one) for key, one in known.items() if one.folder is not None]
    if asked is not None:
        chosen, place = _load(str(asked.path), asked.eos_token, asked.bos), "`tokenizer.path`"
    elif spec.init is not None and not found:
        chosen, place = _load(str(spec.init.path), None, "auto"), "that of `init`"
    elif found:
        place, chosen = f"`{found[0][0]}`", found[0][1]
    else:
        raise SpecError(
            "`tokenizer` is missing: the data do not tell which one they were made with"
        )
    for key, other in known.items():
        if (other.digest, other.eos_token) != (chosen.digest, chosen.eos_token):
            raise ModelError(
                f"`{key}` was made with the tokenizer {other.digest[:12]} ({other.eos_token}), "
                f"{place} is {chosen.digest[:12]} ({chosen.eos_token}): give the one that the "
                "tokens were made with, or leave `tokenizer` out"
            )
    return chosen


def _load(path: str, eos_token: str | None, bos: BosSetting) -> KnownTokenizer:
    made = load_tokenizer(path, eos_token)
    return KnownTokenizer(made.digest, made.eos_token, path, bos, made.chat_template)


def prompt_columns(item: DataSource, uri: str) -> ColumnNames:
    """The columns of a source; if it names none, and the file at `uri` has no `text`, those of
    conversations, or of prompts and answers, under common names.
    """
    if item.columns != ColumnNames():
        return item.columns
    names = columns_of(uri)
    if not names:
        records = read_records(
            uri, lambda _: [], text="text", max_chars=_MAX_CHARS, given=item.reader
        )
        names = {key for record in islice(records, 1) for key in record.values}
    if "text" in names:
        return item.columns
    if "messages" in names:
        return ColumnNames(messages="messages")
    if "instruction" in names and "response" not in names:
        return ColumnNames(text="instruction")
    pair = next((pair for pair in _PAIRS if set(pair) <= names), None)
    return item.columns if pair is None else ColumnNames(prompt=pair[0], text=pair[1])
