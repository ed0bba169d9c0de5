"""What a classifier's training reads from outside its store: images, classifiers, own code."""

from dataclasses import dataclass
from typing import Any

from stillhouse.classification.spec import (
    CLASSIFIER_OBJECTIVES,
    LIVE_OBJECTIVES,
    ClassifySpec,
)
from stillhouse.classification.task import StoredClassifier
from stillhouse.custom_code import CustomCode, find_named
from stillhouse.distillation.prepared import Preparation
from stillhouse.errors import ModelError
from stillhouse.models.shape import model_uri
from stillhouse.pipelines.given import model_identity
from stillhouse.pipelines.image_inputs import (
    images_identity,
    open_classifier,
    unlabelled_identity,
)
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo
from stillhouse.text.tokenizer import has_tokenizer, tokenizer_identity


@dataclass(frozen=True, slots=True)
class ClassifyInputs:
    """Images, classifiers and the user's code, known by content.

    Attributes:
        unlabelled: content of the images without labels.
        body: content of the language model of a fresh network.
        tokenizer: folder of that of texts, as the spec names it.
        stored: whether teachers answer to all images before the training.
        own: a user's objective.
    """

    preparation: Preparation
    init: StoredClassifier | None
    teachers: tuple[StoredClassifier, ...]
    unlabelled: str | None
    stored: bool
    own: CustomCode | None
    body: tuple[str, ...] = ()
    tokenizer: str | None = None

    def identity(self) -> list[Any]:
        given = [] if self.init is None else [self.init.digest]
        given += [teacher.digest for teacher in self.teachers]
        own = [] if self.own is None else [self.own.digest]
        own += [] if self.unlabelled is None else [self.unlabelled]
        return [self.preparation.images, *self.preparation.code, given, *own, *self.body]


def open_classify(
    store: Store,
    spec: ClassifySpec,
    files: list[FileInfo],
    unlabelled: list[FileInfo],
    *,
    remember: bool,
) -> ClassifyInputs:
    """Digest the files and look up given classifiers.

    Raises:
        ModelError: no classifier at a path, no tokenizer beside a language model.
        BadFileError: a file vanished.
        SpecError: the user's code is not here.
    """
    objective = spec.train.objective
    teachers = tuple(
        open_classifier(store, one, f"train.objective.teachers.{i}", remember=remember)
        for i, one in enumerate(objective.teachers)
    )
    networks, own = classifier_code(spec)
    model, tokenizer = spec.network.path, None
    if spec.data.kind == "texts":
        tokenizer = model if spec.init is None else str(spec.init.path)
        if not has_tokenizer(model_uri(str(tokenizer))):
            raise ModelError(
                f"{tokenizer!r} has no tokenizer beside it: texts are read by the one that a "
                "language model was trained with"
            )
    read_by = None if tokenizer is None else tokenizer_identity(tokenizer, None)
    return ClassifyInputs(
        Preparation(
            images_identity(store, spec.data, files, read_by, remember=remember),
            zca=False,
            code=tuple(code.digest for code in networks),
        ),
        None if spec.init is None else open_classifier(store, spec.init, "init", remember=remember),
        teachers,
        unlabelled_identity(store, spec.unlabelled, unlabelled, remember=remember)
        if spec.unlabelled
        else None,
        bool(teachers) and objective.signals == "stored" and objective.name not in LIVE_OBJECTIVES,
        own,
        () if model is None else (model_identity(store, model_uri(model), remember=remember),),
        tokenizer,
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
