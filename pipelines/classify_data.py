"""What a classifier's training reads from outside its store: images, classifiers, own code."""

from dataclasses import dataclass
from typing import Any

from stillhouse.classification.spec import (
    CLASSIFIER_OBJECTIVES,
    LIVE_OBJECTIVES,
    ClassifySpec,
    GivenClassifier,
)
from stillhouse.classification.task import CONFIG, StoredClassifier
from stillhouse.custom_code import CustomCode, find_named
from stillhouse.distillation.prepared import Preparation
from stillhouse.errors import ArtifactError, ModelError
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.given import model_identity
from stillhouse.pipelines.image_inputs import images_identity
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, absolute_uri, list_files, list_names
from stillhouse.storage.task import identity


@dataclass(frozen=True, slots=True)
class ClassifyInputs:
    """Images, classifiers and the user's code, known by content.

    Attributes:
        stored: whether teachers answer to all images before the training.
        own: a user's objective.
    """

    preparation: Preparation
    init: StoredClassifier | None
    teachers: tuple[StoredClassifier, ...]
    stored: bool
    own: CustomCode | None

    def identity(self) -> list[Any]:
        given = [] if self.init is None else [self.init.digest]
        given += [teacher.digest for teacher in self.teachers]
        own = [] if self.own is None else [self.own.digest]
        return [self.preparation.images, *self.preparation.code, given, *own]


def open_classify(
    store: Store, spec: ClassifySpec, files: list[FileInfo], *, remember: bool
) -> ClassifyInputs:
    """Digest the files and look up given classifiers.

    Raises:
        ModelError: no classifier at a path. BadFileError: a file vanished.
        SpecError: the user's code is not here.
    """
    objective = spec.train.objective
    teachers = tuple(
        _stored(store, one, f"train.objective.teachers.{i}", remember)
        for i, one in enumerate(objective.teachers)
    )
    networks, own = classifier_code(spec)
    return ClassifyInputs(
        Preparation(
            images_identity(store, spec.data, files, remember=remember),
            zca=False,
            code=tuple(code.digest for code in networks),
        ),
        None if spec.init is None else _stored(store, spec.init, "init", remember),
        teachers,
        bool(teachers) and objective.signals == "stored" and objective.name not in LIVE_OBJECTIVES,
        own,
    )


def classifier_code(spec: ClassifySpec) -> tuple[list[CustomCode], CustomCode | None]:
    """The user's networks and objective, as far as they are not installed.

    Raises:
        SpecError: it is not here, is too large, or has no such name.
    """
    networks = [find_named("network", name) for name in spec.own_names]
    name = spec.train.objective.name
    built_in = name in CLASSIFIER_OBJECTIVES
    own = None if built_in else find_named("train.objective.name", name)
    return [code for code in networks if code is not None], own


def _stored(store: Store, given: GivenClassifier, key: str, remember: bool) -> StoredClassifier:
    """A classifier by the digest of its files."""
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
            f"`{key}`: {uri} is no classifier of images ({CONFIG} and weights.safetensors): give a "
            "result of `task: classify`, or a state dict in safetensors with its `network`"
        )
    return StoredClassifier(model_identity(store, uri, remember=remember), uri)
