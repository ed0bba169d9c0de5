"""What a spec names and does not make: models, a tokenizer, a selection.

They are looked at before any work, where only small files are read and nothing is written. A given
model is then inspected in a Ray task (the driver imports neither torch nor transformers) and put
into the store once, where every worker finds it: a hub's cache or a folder is on one machine.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

from stillhouse.errors import ModelError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.shape import (
    INDEX,
    ModelHeader,
    ModelShape,
    model_uri,
    planned_sizes,
    read_header,
)
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.named import find_input
from stillhouse.reading.readers import open_selection
from stillhouse.selection.own import find_code
from stillhouse.spec import ModelSettings, SelectSpec, TokenizerSettings
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import absolute_uri, list_files, list_names
from stillhouse.storage.folders import copy_folder
from stillhouse.storage.layout import MANIFEST
from stillhouse.text.tokenizer import (
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    load_vocabulary,
    tokenizer_identity,
)
from stillhouse.training.seen import SEEN
from stillhouse.training.task import TRAINED_ON

INSPECT_VERSION = 2


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model: its identity, where it lies, its sizes, and on how many tokens it was trained."""

    fingerprint: str
    folder: str
    shape: ModelShape
    num_tokens: int = 0
    trained_here: bool = False
    made_here: bool = False
    """Whether a training of this or another job of a store made it."""


def check_given(spec: SelectSpec) -> None:
    """Refuse given things that are not there.

    Raises:
        ModelError: no model or tokenizer at its path, or a model to train that cannot be built.
            ArtifactError: no selection at `threshold_from`. SpecError: no such scorer.
    """
    paths = given_paths(spec)
    for key, path in paths.items():
        read_header(model_uri(path), _called(key, path))
    vocab_size = 0  # of a tokenizer that is still to be trained nothing is known
    if spec.tokenizer.path is not None:
        vocab_size = check_tokenizer(spec.tokenizer, paths).vocab_size
    fresh = [] if spec.prior.path is not None or spec.scorer is not None else [spec.prior.model]
    fresh += [spec.train.model] if spec.train is not None else []
    for model in fresh:
        planned_sizes(model or ModelSettings(), vocab_size, spec.sequence_length)
    if spec.scorer is not None:
        find_code(spec.scorer.import_)
    if spec.selection.threshold_from is not None:
        open_selection(
            selection_uri(Store(absolute_uri(spec.store)), spec.selection.threshold_from)
        )


def check_tokenizer(asked: TokenizerSettings, models: Mapping[str, str]) -> Tokenizer:
    """A spec's tokenizer, which has to be that of the models that are given by path.

    Raises:
        SpecError: the models have none beside them, and the spec names no other.
        ModelError: none there, one of another model, or no BOS where one is asked for.
    """
    path = str(asked.path)
    if path in models.values() and not has_tokenizer(model_uri(path)):
        raise SpecError(
            f"the model {path!r} has no tokenizer beside it: set `tokenizer.path` to the one that "
            "it was trained with"
        )
    made = load_tokenizer(path, asked.eos_token)
    made.bos_id(asked.bos)
    check_vocabulary(made, path, models)
    return made


def check_vocabulary(made: Tokenizer, path: str, models: Mapping[str, str]) -> None:
    """Refuse a tokenizer of other pieces, ids or merges than the one beside a model.

    Raises:
        ModelError: naming both, and how many ids they have.
    """
    for key, model in models.items():
        folder = model_uri(model)
        if model == path or "tokenizer.json" not in list_names(folder):
            continue
        own = load_vocabulary(folder)
        if own != made.vocabulary:
            raise ModelError(
                f"the tokenizer {path!r} is not the one beside {_called(key, model)}: pieces, ids "
                f"or merges differ ({made.vocab_size} ids, the model's {own.size}), so that the "
                "model would read other text than was written. Leave `tokenizer` out to use the "
                "model's own; two models have to share one"
            )


def given_paths(spec: SelectSpec) -> dict[str, str]:
    """The models that a spec gives by path, by their keys."""
    paths = {"prior": spec.prior.path, "conditional": spec.conditional.path}
    return {key: path for key, path in paths.items() if path is not None}


def _called(key: str, path: str) -> str:
    return f"{key} {path!r}"


@dataclass(frozen=True, slots=True)
class Needs:
    """What given models have to be.

    Attributes:
        vocab_size: of the tokenizer; 0 where it is still to be trained.
        num_positions: tokens that they read at once.
        encoder_decoder: text-to-text models, else models that can be scored with.
        comparable: one's losses are subtracted from the other's: on the same tokens, in the same
            context.
    """

    vocab_size: int = 0
    num_positions: int = 0
    encoder_decoder: bool = False
    comparable: bool = False


def given_models(ctx: Context, paths: Mapping[str, str], needs: Needs) -> dict[str, ModelRef]:
    """Inspect models and put them into the store; those that are there already are found.

    Args:
        ctx: the run.
        paths: folder, URI or hub name of each, by its key in the spec.
        needs: checked before anything is written.

    Raises:
        ModelError: no such model, one that `inspect_model` refuses, or that does not fit.
    """
    if not paths:
        return {}
    store = ctx.store
    folders = {key: model_uri(path) for key, path in paths.items()}
    contents = {k: model_identity(store, f, remember=not ctx.dry) for k, f in folders.items()}
    kind = [INSPECT_VERSION, needs.encoder_decoder]
    names = {key: fingerprint(["given model", kind, made]) for key, made in contents.items()}
    found = {key: store.find_manifest("models", name) for key, name in names.items()}
    there = {key: manifest for key, manifest in found.items() if manifest is not None}
    total, reused = len(paths), len(there)
    with ctx.step("given models", total=total, reused=reused, unit="models") as advance:
        todo = {key: path for key, path in paths.items() if key not in there}
        headers = {key: read_header(folders[key], _called(key, path)) for key, path in todo.items()}
        shapes = {key: ModelShape(**made.totals["shape"]) for key, made in there.items()}
        if headers:
            from stillhouse.pipelines.steps import run_tasks  # Ray, where there is something to do

            work = partial(_inspect, needs.encoder_decoder)
            shapes |= next(run_tasks(ctx, work, [headers]))
        _check(paths, shapes, needs)
        for key, path in todo.items():
            there[key] = _put(store, names[key], folders[key], path, shapes[key])
            advance(1, 1)
    return {
        key: ModelRef(
            contents[key],
            store.path(there[key].inputs["folder"]),
            shapes[key],
            made_here=MANIFEST in list_names(folders[key]),
        )
        for key in paths
    }


def _inspect(encoder_decoder: bool, headers: dict[str, ModelHeader]) -> dict[str, ModelShape]:
    from stillhouse.models.inspection import inspect_model

    return {
        key: inspect_model(header, encoder_decoder=encoder_decoder)
        for key, header in headers.items()
    }


def _check(paths: Mapping[str, str], shapes: Mapping[str, ModelShape], needs: Needs) -> None:
    for key, path in paths.items():
        shapes[key].check(_called(key, path), needs.vocab_size, needs.num_positions)
    if needs.comparable and len(paths) == 2:
        prior, conditional = (shapes[key] for key in paths)
        for name, mine, theirs in (
            ("a vocabulary", conditional.vocab_size, prior.vocab_size),
            ("a context", conditional.max_positions, prior.max_positions),
        ):
            if mine != theirs:
                raise ModelError(
                    f"the conditional has {name} of {mine} tokens, the prior of {theirs}: their "
                    "losses cannot be compared (`conditional.path`)"
                )


def _put(store: Store, name: str, folder: str, path: str, shape: ModelShape) -> Manifest:
    """A model of this very store stays where it is."""
    inside = folder.startswith(f"{store.uri}/")
    files = [f for f in list_names(folder) if _belongs(f)]
    return copy_folder(
        store,
        name,
        folder,
        [] if inside else files,
        inputs={"folder": folder.removeprefix(f"{store.uri}/") if inside else f"models/{name}"},
        settings={"path": path},
        totals={"role": "given", "shape": asdict(shape)},
    )


def _belongs(name: str) -> bool:
    """Files of a model: configuration, weights, and what it was trained on."""
    return name in {"config.json", INDEX, TRAINED_ON, SEEN} or name.endswith(".safetensors")


def given_identity(store: Store, spec: SelectSpec, *, remember: bool) -> list[str | None]:
    """What the given things hold, for the identity of a run: their content, not their paths.

    Models, tokenizer, selection, and the code of a scorer.
    """
    models = [
        None if path is None else model_identity(store, model_uri(path), remember=remember)
        for path in (spec.prior.path, spec.conditional.path)
    ]
    tokenizer, threshold = spec.tokenizer.path, spec.selection.threshold_from
    return [
        *models,
        None if tokenizer is None else tokenizer_identity(tokenizer, spec.tokenizer.eos_token),
        None
        if threshold is None
        else open_selection(selection_uri(store, threshold)).manifest.fingerprint,
        None if spec.scorer is None else find_code(spec.scorer.import_).digest,
    ]


def model_identity(store: Store, folder: str, *, remember: bool) -> str:
    """The fingerprint of a given model: names and content of its configuration and weights."""
    files = list_files([folder], ("config.json", ".safetensors"))
    digests = digest_files(store, files, remember=remember)
    return weights_digest({f.name: d.sha256 for f, d in zip(files, digests, strict=True)})


def weights_digest(files: Mapping[str, str]) -> str:
    """The identity of a model, trained here or given: its configuration and weights, by file.

    What is made with a model is named by it, so that the results of two trainings never mix, not
    even of one training whose sums were added up in another order.
    """
    kept = {n: d for n, d in files.items() if n == "config.json" or n.endswith(".safetensors")}
    return fingerprint(["given", sorted(kept.items())])


def selection_uri(store: Store, given: str) -> str:
    """Where a selection lies: as `find_input`."""
    return find_input(store, given)
