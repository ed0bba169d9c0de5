"""What a spec names and does not make: models, a tokenizer, a selection. Looked at before any work.

Only small files are read (configurations, a tokenizer, a manifest), nothing is written.
"""

from stillhouse.errors import ModelError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.shape import ModelShape, model_uri, planned_sizes, read_shape
from stillhouse.reading.readers import open_selection
from stillhouse.selection.own import find_code
from stillhouse.spec import ModelSettings, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import absolute_uri, list_files, list_names
from stillhouse.text.tokenizer import load_tokenizer


def check_given(spec: SelectSpec) -> None:
    """Refuse given things that are not there or do not fit each other.

    Raises:
        ModelError: no model or tokenizer at its path; a model that cannot read the sequences, or
            cannot be built; a conditional unlike the prior. ArtifactError: no selection at
            `threshold_from`. SpecError: no such scorer.
    """
    vocab_size = 0  # of a tokenizer that is still to be trained nothing is known
    if spec.tokenizer.path is not None:
        vocab_size = load_tokenizer(spec.tokenizer.path, spec.tokenizer.eos_token).vocab_size
    shapes = {
        what: given_shape(path, what, vocab_size, spec.sequence_length)
        for what, path in (("prior", spec.prior.path), ("conditional", spec.conditional.path))
        if path is not None
    }
    fresh = [] if spec.prior.path is not None or spec.scorer is not None else [spec.prior.model]
    fresh += [spec.train.model] if spec.train is not None else []
    for model in fresh:
        planned_sizes(model or ModelSettings(), vocab_size, spec.sequence_length)
    if len(shapes) == 2:
        check_pair(shapes["prior"], shapes["conditional"])
    if spec.scorer is not None:
        find_code(spec.scorer.import_)
    if spec.selection.threshold_from is not None:
        open_selection(
            selection_uri(Store(absolute_uri(spec.store)), spec.selection.threshold_from)
        )


def given_shape(path: str, what: str, vocab_size: int, sequence_length: int) -> ModelShape:
    """The shape of the model at a path.

    Raises:
        ModelError: no model there, none in safetensors, or one that cannot read the sequences.
    """
    folder = model_uri(path)
    shape = read_shape(folder)
    shape.check(f"{what} {path!r}", vocab_size, sequence_length)
    if not any(name.endswith(".safetensors") for name in list_names(folder)):
        raise ModelError(f"{what} {path!r} holds no safetensors weights (`{what}.path`)")
    return shape


def check_pair(prior: ModelShape, conditional: ModelShape) -> None:
    """Losses of two models can only be compared on the same tokens in the same context.

    Raises:
        ModelError: another vocabulary or context length.
    """
    for name, mine, theirs in (
        ("a vocabulary", conditional.vocab_size, prior.vocab_size),
        ("a context", conditional.max_positions, prior.max_positions),
    ):
        if mine != theirs:
            raise ModelError(
                f"the conditional has {name} of {mine} tokens, the prior of {theirs}: their losses "
                "cannot be compared (`conditional.path`)"
            )


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
        None if tokenizer is None else load_tokenizer(tokenizer, spec.tokenizer.eos_token).digest,
        None
        if threshold is None
        else open_selection(selection_uri(store, threshold)).manifest.fingerprint,
        None if spec.scorer is None else find_code(spec.scorer.import_).digest,
    ]


def model_identity(store: Store, folder: str, *, remember: bool) -> str:
    """The fingerprint of a given model: names and content of its configuration and weights."""
    files = list_files([folder], ("config.json", ".safetensors"))
    digests = digest_files(store, files, remember=remember)
    return fingerprint(["given", [[f.name, d.sha256] for f, d in zip(files, digests, strict=True)]])


def selection_uri(store: Store, given: str) -> str:
    """Where a selection lies that is named by URI, or by its fingerprint in this store."""
    return given if "/" in given else store.path("selections", given)
