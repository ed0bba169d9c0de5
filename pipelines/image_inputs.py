"""What a job on images reads from outside its store: images, given experts, own code."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stillhouse.classification.task import CONFIG, StoredClassifier
from stillhouse.classification.unlabelled import UnlabelledImages
from stillhouse.custom_code import CustomCode, find_named
from stillhouse.distillation.image_files import list_source
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.matching_task import GivenExpert
from stillhouse.distillation.prepared import Preparation
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import ArtifactError, ModelError
from stillhouse.fingerprint import fingerprint
from stillhouse.models.network_settings import GivenClassifier
from stillhouse.pipelines.given import model_identity
from stillhouse.storage.artifact import Store, load_manifest
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, absolute_uri, list_files, list_names
from stillhouse.storage.task import identity

IMAGES_VERSION = 3


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """Images and the user's code, known by content, given experts, and given teachers by number."""

    preparation: Preparation
    experts: tuple[GivenExpert, ...]
    teachers: dict[int, StoredClassifier] = field(default_factory=dict[int, StoredClassifier])

    def identity(self) -> list[Any]:
        given = {str(number): one.digest for number, one in self.teachers.items()}
        return [
            self.preparation.images,
            [expert.name for expert in self.experts],
            *self.preparation.code,
            *([given] if given else []),
        ]


def list_images(
    data: ImageData, listed: Callable[[str], list[FileInfo]] = list_source
) -> list[FileInfo]:
    """The files of a source; none for a data set that a library ships.

    Raises:
        InputError: nothing matches. SpecError: files of arrays, which are not read.
    """
    if data.path is None:
        return []
    files = listed(data.path)
    return files + (listed(data.test) if isinstance(data.test, str) else [])


def open_images(
    store: Store, spec: DistillSpec, files: list[FileInfo], *, remember: bool
) -> ImageInputs:
    """Digest the files and look up given experts and teachers.

    Raises:
        ArtifactError: a given expert is missing, or was trained on other kinds of pixels; a given
            teacher is no classifier. ModelError: no folder at its path.
        BadFileError: a file vanished. SpecError: the user's code is not here.
    """
    images = images_identity(store, spec.data, files, remember=remember)
    uris = [absolute_uri(uri) for uri in (spec.experts and spec.experts.path) or []]
    zca = spec.preprocessing.zca
    experts = tuple(GivenExpert(_expert_name(uri, zca), uri) for uri in uris)
    code = tuple(own.digest for own in named_code(spec))
    teachers = {
        i: open_classifier(store, one, f"teachers.{i}", remember=remember)
        for i, one in spec.given_teachers.items()
    }
    return ImageInputs(Preparation(images, zca, code), experts, teachers)


def images_identity(
    store: Store,
    data: ImageData,
    files: list[FileInfo],
    tokenizer: str | None = None,
    *,
    remember: bool,
) -> str:
    """The fingerprint of the images artifact: the files' content, and what reads it.

    Args:
        tokenizer: identity of that of texts.
    """
    settings = data.identity()
    if isinstance(data.test, str):
        settings.pop("test")
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer
    return _identity(store, "images", settings, files, remember)


def unlabelled_identity(
    store: Store, source: UnlabelledImages, files: list[FileInfo], *, remember: bool
) -> str:
    """The same of images without labels."""
    settings = source.model_dump(mode="json", exclude={"path", "share"})
    return _identity(store, "unlabelled", settings, files, remember)


def _identity(
    store: Store, what: str, settings: dict[str, Any], files: list[FileInfo], remember: bool
) -> str:
    digests = [d.sha256 for d in digest_files(store, files, remember=remember)] if files else []
    names = [file.name for file in files]
    return fingerprint([what, IMAGES_VERSION, settings, names, digests])


def open_classifier(
    store: Store, given: GivenClassifier, key: str, *, remember: bool
) -> StoredClassifier:
    """A classifier by the digest of its files; `key` in the spec is named in errors.

    Raises:
        ModelError: no such folder. ArtifactError: no classifier in it. BadFileError: no such file.
    """
    uri = absolute_uri(str(given.path))
    if given.network is not None:
        [digest] = digest_files(store, list_files([uri], (".safetensors",)), remember=remember)
        name = fingerprint(["state dict", digest.sha256, identity(given.network)])
        return StoredClassifier(name, uri, given.network)
    names = list_names(uri)
    if not names:
        raise ModelError(f"`{key}`: no such folder: {uri}")
    if not {CONFIG, "weights.safetensors"} <= {*names}:
        raise ArtifactError(
            f"`{key}`: {uri} is no classifier ({CONFIG} and weights.safetensors): give a "
            "result of `task: classify`, or a state dict in safetensors with its `network`"
        )
    return StoredClassifier(model_identity(store, uri, remember=remember), uri)


def _expert_name(uri: str, zca: bool) -> str:
    """A given expert's fingerprint; it must have seen the job's kind of pixels, whitened or not."""
    manifest = load_manifest(uri, "trajectories")
    if manifest.settings.get("zca", zca) != zca:
        raise ArtifactError(
            f"{uri} was trained with `preprocessing.zca: {str(not zca).lower()}`, this job has "
            f"{str(zca).lower()}: give the experts' own, or train new ones"
        )
    return manifest.fingerprint


def named_code(spec: DistillSpec) -> list[CustomCode]:
    """The user's networks and method, as far as they are not installed; `submit` sends them.

    Raises:
        SpecError: it is not here, is too large, or has no such name.
    """
    found = (find_named("factory", name) for name in spec.own_names)
    return [code for code in found if code is not None]
