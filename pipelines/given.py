"""What a spec names and does not make: runs and artifacts (`from:`), models, a tokenizer.

They are checked before any work, where only small files are read and nothing is written. A given
model is then inspected on a worker (the driver imports neither torch nor transformers) and copied
into the store once, where every worker finds it: a hub's cache or a folder is on one machine only.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from stillhouse.errors import ArtifactError, ModelError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.shape import (
    INDEX,
    ModelHeader,
    ModelShape,
    model_uri,
    not_causal,
    planned_sizes,
    read_header,
)
from stillhouse.named_inputs import artifacts_of, each_from
from stillhouse.pipelines.context import Context, run_tasks
from stillhouse.reading.readers import open_selection
from stillhouse.selection.own import find_code
from stillhouse.selection.rules import rules_of
from stillhouse.settings import Settings
from stillhouse.spec import ModelSettings, SelectSpec, TokenizerSettings
from stillhouse.storage import names
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import absolute_uri, exists, join, list_files, list_names
from stillhouse.storage.folders import copy_folder
from stillhouse.storage.layout import MANIFEST, artifact_names
from stillhouse.storage.run_record import read_json
from stillhouse.text.tokenizer import (
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
    load_vocabulary,
    tokenizer_identity,
)
from stillhouse.training.seen import SEEN
from stillhouse.training.spec import LoraSettings
from stillhouse.training.task import TRAINED_ON

INSPECT_VERSION = 2
S = TypeVar("S", bound=Settings)
_KINDS = ("runs", "selections", "tokens", "models", "generated")
_ID = re.compile(r"[0-9a-f]{8,64}")


def resolved(spec: S, store: Store) -> S:
    """The spec with what each `from` names, as a `path` where the section has one."""

    def found(settings: Settings, section: str, name: str) -> dict[str, str | None]:
        uri = find_input(store, name, section)
        has_path = "path" in type(settings).model_fields
        return {"path": uri, "from_": None} if has_path else {"from_": uri}

    return each_from(spec, found)


def find_input(store: Store, name: str, section: str = "data") -> str:
    """The folder of an artifact.

    Args:
        store: of the job; ids are looked for in it.
        name: a run's URI or id, STORE#NAME (#NAME of this store), or an artifact's URI or id; ids
            may be shortened to eight characters.
        section: the section of the spec that names it.

    Raises:
        ArtifactError: nothing of that name, or a run that is not finished or made no such thing.
        SpecError: an ambiguous id.
    """
    place, mark, published_name = name.rpartition("#")
    if mark and "/" not in published_name:
        place = absolute_uri(place) if place else store.uri
        published = names.published(place, published_name)
        return join(place, published.kind, published.selection)
    folder = absolute_uri(name)
    if _ID.fullmatch(name) and not exists(folder):
        folder = _by_id(store, name)
    return _made_by(folder, section) if folder.rsplit("/", 2)[-2] == "runs" else folder


def _by_id(store: Store, prefix: str) -> str:
    found = [
        store.path(kind, name)
        for kind in _KINDS
        for name in artifact_names(store.path(kind))
        if name.startswith(prefix)
    ]
    if not found:
        raise ArtifactError(f"no run and no artifact of {store.uri} has an id that begins {prefix}")
    if len(found) > 1:
        raise SpecError(f"{prefix!r} may be any of {', '.join(found)}: give more characters")
    return found[0]


def _made_by(run: str, section: str) -> str:
    """The artifact that a section takes of a run."""
    result = read_json(run, "result.json")
    if result is None:
        known = "the run is not finished" if exists(join(run, "spec.yaml")) else "no run"
        raise ArtifactError(f"{run}: {known} (see `stillhouse status {run}`)")
    made = [result["artifacts"].get(key) for key in artifacts_of(section)]
    found = next((uri for uri in made if uri), None)
    if found is None and "model" in artifacts_of(section) and "model_fingerprint" in result:
        found = join(run.rsplit("/", 2)[0], "models", result["model_fingerprint"])  # the best
    if found is None:
        noun = artifacts_of(section)[0]
        raise ArtifactError(f"{run} is a run of `job: {result['job']}`: it made no {noun}")
    return found


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model in the store.

    Attributes:
        num_tokens: that it was trained on.
        trained_here: whether this job trained it.
        made_here: whether a training of this or another job made it.
    """

    fingerprint: str
    folder: str
    shape: ModelShape
    num_tokens: int = 0
    trained_here: bool = False
    made_here: bool = False


def check_given(spec: SelectSpec) -> None:
    """Refuse what cannot be found or does not fit together, before anything is written.

    Raises:
        ModelError: no model or tokenizer at its path, or a model to train that cannot be built.
        ArtifactError: no selection at `threshold_from`.
        SpecError: no such scorer or rule.
    """
    paths = given_paths(spec)
    for key, path in paths.items():
        read_header(model_uri(path), f"{key} {path!r}").check_causal()
    vocab_size = 0  # unknown, where the tokenizer is still to be trained
    if spec.tokenizer.path is not None:
        vocab_size = check_tokenizer(spec.tokenizer, paths).vocab_size
    fresh = [] if spec.prior.path is not None or spec.scorer is not None else [spec.prior.model]
    fresh += [spec.train.model] if spec.train is not None else []
    for model in fresh:
        planned_sizes(model or ModelSettings(), vocab_size, spec.sequence_length)
    if spec.scorer is not None:
        find_code(spec.scorer.import_)
    rules_of(spec)
    if spec.selection.threshold_from is not None:
        open_selection(find_input(Store(absolute_uri(spec.store)), spec.selection.threshold_from))


def check_tokenizer(settings: TokenizerSettings, models: Mapping[str, str]) -> Tokenizer:
    """The tokenizer at `settings.path`, which has to be that of the models given by path.

    Raises:
        SpecError: the models have none beside them, and the spec names no other.
        ModelError: none there, one of another model, or no BOS where one is asked for.
    """
    path = str(settings.path)
    if path in models.values() and not has_tokenizer(model_uri(path)):
        raise SpecError(
            f"the model {path!r} has no tokenizer beside it: set `tokenizer.path` to the one that "
            "it was trained with"
        )
    tokenizer = load_tokenizer(path, settings.eos_token)
    tokenizer.bos_id(settings.bos)
    check_vocabulary(tokenizer, path, models)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, path: str, models: Mapping[str, str]) -> None:
    """Refuse a tokenizer whose pieces, ids or merges differ from those beside a model.

    Raises:
        ModelError: naming both, and how many ids they have.
    """
    for key, model in models.items():
        folder = model_uri(model)
        if model == path or "tokenizer.json" not in list_names(folder):
            continue
        vocabulary = load_vocabulary(folder)
        if vocabulary != tokenizer.vocabulary:
            raise ModelError(
                f"the tokenizer {path!r} is not the one beside {key} {model!r}: pieces, ids or "
                f"merges differ ({tokenizer.vocab_size} ids, the model's {vocabulary.size}), so "
                "that the model would read other text than was written. Leave `tokenizer` out to "
                "use the model's own; two models have to share one"
            )


def given_paths(spec: SelectSpec) -> dict[str, str]:
    """The models that a spec gives by path, by their keys."""
    paths = {"prior": spec.prior.path, "conditional": spec.conditional.path}
    return {key: path for key, path in paths.items() if path is not None}


@dataclass(frozen=True, slots=True)
class Needs:
    """Requirements of given models.

    Attributes:
        vocab_size: of the tokenizer; 0 where it is still to be trained.
        num_positions: tokens that they read at once.
        encoder_decoder: text-to-text models; else models that can score.
        comparable: the losses of one are subtracted from those of the other, so that both need the
            same vocabulary and context.
        lora: adapters that are put on them.
        masked: masked language models will do.
    """

    vocab_size: int = 0
    num_positions: int = 0
    encoder_decoder: bool = False
    comparable: bool = False
    lora: LoraSettings | None = None
    masked: bool = False

    def check(self, paths: Mapping[str, str], shapes: Mapping[str, ModelShape]) -> None:
        for key, path in paths.items():
            if shapes[key].masked and not self.masked:
                raise ModelError(not_causal(f"{key} {path!r}"))
            shapes[key].check(f"{key} {path!r}", self.vocab_size, self.num_positions)
        if not self.comparable or len(paths) != 2:
            return
        prior, conditional = (shapes[key] for key in paths)
        for name, mine, other in (
            ("a vocabulary", conditional.vocab_size, prior.vocab_size),
            ("a context", conditional.max_positions, prior.max_positions),
        ):
            if mine != other:
                raise ModelError(
                    f"the conditional has {name} of {mine} tokens, the prior of {other}: their "
                    "losses cannot be compared (`conditional.path`)"
                )


def given_models(ctx: Context, paths: Mapping[str, str], needs: Needs) -> dict[str, ModelRef]:
    """Inspect models and put them into the store, unless they are there.

    Args:
        paths: folder, URI or hub name of each, by its key in the spec.
        needs: checked before anything is written.

    Raises:
        ModelError: no such model, one that `inspect_model` refuses, or that does not fit, or that
            has no layers for the adapters.
    """
    if not paths:
        return {}
    store = ctx.store
    folders = {key: model_uri(path) for key, path in paths.items()}
    contents = {k: model_identity(store, f, remember=not ctx.dry) for k, f in folders.items()}
    kind = [INSPECT_VERSION, needs.encoder_decoder]
    ids = {key: fingerprint(["given model", kind, made]) for key, made in contents.items()}
    found = {key: store.find_manifest("models", name) for key, name in ids.items()}
    manifests = {key: manifest for key, manifest in found.items() if manifest is not None}
    total, reused = len(paths), len(manifests)
    with ctx.step("given models", total=total, reused=reused, unit="models") as advance:
        todo = {key: path for key, path in paths.items() if key not in manifests}
        asked = paths if needs.lora is not None and not ctx.dry else todo
        headers = {key: read_header(folders[key], f"{key} {path!r}") for key, path in asked.items()}
        shapes = {key: ModelShape(**made.totals["shape"]) for key, made in manifests.items()}
        if headers:
            shapes |= next(run_tasks(ctx, partial(_inspect, needs), [headers]))
        needs.check(paths, shapes)
        for key, path in todo.items():
            manifests[key] = _put(store, ids[key], folders[key], path, shapes[key])
            advance(1, 1)
    return {
        key: ModelRef(
            contents[key],
            store.path(manifests[key].inputs["folder"]),
            shapes[key],
            made_here=MANIFEST in list_names(folders[key]),
        )
        for key in paths
    }


def _inspect(needs: Needs, headers: dict[str, ModelHeader]) -> dict[str, ModelShape]:
    from stillhouse.models.inspection import inspect_model

    check = None
    if needs.lora is not None:
        from stillhouse.training.lora import adapted_layers  # peft, which is an extra

        check = partial(adapted_layers, settings=needs.lora)
    return {
        key: inspect_model(header, encoder_decoder=needs.encoder_decoder, check=check)
        for key, header in headers.items()
    }


def _put(store: Store, name: str, folder: str, path: str, shape: ModelShape) -> Manifest:
    """Copy a model into the store; one of this very store stays where it is."""
    inside = folder.startswith(f"{store.uri}/")
    files = [
        file
        for file in list_names(folder)
        if file in {"config.json", INDEX, TRAINED_ON, SEEN} or file.endswith(".safetensors")
    ]
    return copy_folder(
        store,
        name,
        folder,
        [] if inside else files,
        inputs={"folder": folder.removeprefix(f"{store.uri}/") if inside else f"models/{name}"},
        settings={"path": path},
        totals={"role": "given", "shape": asdict(shape)},
    )


def given_identity(store: Store, spec: SelectSpec, *, remember: bool) -> list[str | None]:
    """The content of what is given, for the identity of a run.

    Models, tokenizer, selection, and the code of a scorer and of rules.
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
        else open_selection(find_input(store, threshold)).manifest.fingerprint,
        None if spec.scorer is None else find_code(spec.scorer.import_).digest,
        *[rule.code.digest for rule in rules_of(spec) if rule.code is not None],
    ]


def model_identity(store: Store, folder: str, *, remember: bool) -> str:
    """The identity of a model in a folder: `weights_digest` of its files."""
    files = list_files([folder], ("config.json", ".safetensors"))
    digests = digest_files(store, files, remember=remember)
    return weights_digest({f.name: d.sha256 for f, d in zip(files, digests, strict=True)})


def weights_digest(files: Mapping[str, str]) -> str:
    """The identity of a model: its configuration and weights, by the digests of its files.

    What is made with a model is named by it, so that the results of two trainings never mix, even
    where the same training summed in another order.
    """
    kept = {n: d for n, d in files.items() if n == "config.json" or n.endswith(".safetensors")}
    return fingerprint(["given", sorted(kept.items())])
