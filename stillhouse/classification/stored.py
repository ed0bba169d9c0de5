"""Classifiers in the store: written with all that they are built from, and read as teachers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from stillhouse.classification.learner import kept_buffers
from stillhouse.classification.task import CONFIG, StoredClassifier
from stillhouse.distillation.prepared import WEIGHTS, Prepared, frozen
from stillhouse.distillation.preprocessing import Standardisation
from stillhouse.errors import ArtifactError, InputError
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.models.networks import build_network, state_tensors
from stillhouse.storage.filesystem import read_bytes


@dataclass(frozen=True, slots=True)
class BuiltFrom:
    """What a classifier is built from, beside its weights.

    Attributes:
        shape: of the samples it reads, as `Prepared.shape`.
        standardisation: of their values.
        tokenizer: digest of that of texts.
        body: configuration of a language model.
    """

    network: NetworkSettings
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    standardisation: Standardisation
    tokenizer: str = ""
    body: dict[str, Any] | None = None

    @property
    def samples(self) -> tuple[str, str]:
        """What it reads, and the key of the data that decides its shape."""
        if len(self.shape) == 3:
            return "images", "data.image_size"
        if self.tokenizer:
            return "texts", "data.length"
        return "vectors", "data.feature_column"

    @classmethod
    def of(
        cls, network: NetworkSettings, prepared: Prepared, body: dict[str, Any] | None = None
    ) -> "BuiltFrom":
        """For the images of a job."""
        names, scale = prepared.class_names, prepared.standardisation
        return cls(network, prepared.shape, names, scale, prepared.tokenizer, body)

    def build(self, seed: int) -> nn.Module:
        """A fresh network on the CPU."""
        return build_network(self.network, self.shape, len(self.class_names), seed, self.body)

    def to_bytes(self) -> bytes:
        content = {
            "network": self.network.model_dump(mode="json"),
            "shape": list(self.shape),
            "class_names": list(self.class_names),
            "mean": list(self.standardisation.mean),
            "std": list(self.standardisation.std),
        }
        if self.tokenizer:
            content |= {"tokenizer": self.tokenizer, "body": self.body}
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, data: bytes) -> "BuiltFrom":
        content: dict[str, Any] = json.loads(data)
        shape = tuple(content["shape"])
        return cls(
            NetworkSettings.model_validate(content["network"]),
            shape,
            tuple(content["class_names"]),
            Standardisation(tuple(content["mean"]), tuple(content["std"]), len(shape) - 1),
            content.get("tokenizer", ""),
            content.get("body"),
        )


def files_of(network: nn.Module, built: BuiltFrom) -> dict[str, bytes]:
    """The files of a classifier's folder."""
    return {CONFIG: built.to_bytes(), WEIGHTS: save(state_tensors(network))}


def put_tensors(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the parameters and buffers of a network, by name."""
    with torch.no_grad():
        for name, value in (dict(network.named_parameters()) | kept_buffers(network)).items():
            value.copy_(tensors[name])


def load_classifier(stored: StoredClassifier, prepared: Prepared) -> tuple[nn.Module, BuiltFrom]:
    """A stored classifier on the CPU; a state dict alone is taken for one of the job's images.

    Raises:
        ArtifactError: files are missing or do not fit. InputError: weights that are not finite.
    """
    try:
        if stored.network is None:
            built = BuiltFrom.read(read_bytes(f"{stored.uri}/{CONFIG}"))
            tensors = load(read_bytes(f"{stored.uri}/{WEIGHTS}"))
        else:
            built = BuiltFrom.of(stored.network, prepared)
            tensors = load(read_bytes(stored.uri))
    except FileNotFoundError as error:
        raise ArtifactError(f"{stored.uri}: a file of the classifier is missing") from error
    except (KeyError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{stored.uri} is no classifier: {error}") from error
    network = built.build(0)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{stored.uri}: its weights fit no {built.network.label}: {reason}"
        ) from error
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise InputError(f"{stored.uri} has weights that are not finite")
    return network, built


class ImageTeacher(nn.Module):
    """A frozen classifier that answers to a job's images with logits of the job's classes."""

    def __init__(self, network: nn.Module, built: BuiltFrom, prepared: Prepared, key: str) -> None:
        super().__init__()
        if built.shape != prepared.shape:
            what, key_of_data = built.samples
            raise InputError(
                f"`{key}` reads {what} of {built.shape}, the data have {prepared.shape}: set "
                f"`{key_of_data}`, or give another teacher"
            )
        if built.tokenizer != prepared.tokenizer:
            raise InputError(f"`{key}` reads the tokens of another tokenizer: give another teacher")
        index = {name: i for i, name in enumerate(built.class_names)}
        unknown = [name for name in prepared.class_names if name not in index]
        if unknown:
            raise InputError(
                f"`{key}` does not know the class {unknown[0]!r} ({len(unknown)} of "
                f"{prepared.num_classes} classes are unknown to it; it knows "
                f"{', '.join(built.class_names[:6])}): give a teacher of all classes"
            )
        self.network = frozen(network)
        self._from, self._to = prepared.standardisation, built.standardisation
        self._columns = [index[name] for name in prepared.class_names]
        self._all = self._columns == list(range(len(built.class_names)))

    def own(self, images: Tensor) -> Tensor:
        """Images as the teacher was trained on them."""
        if self._from == self._to:
            return images
        return self._to.apply(self._from.pixels(images))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(self.own(images))
        return logits if self._all else logits[:, self._columns]

    def train(self, mode: bool = True) -> "ImageTeacher":
        """It stays in evaluation mode."""
        return super().train(False)


@torch.no_grad()
def check_answers(teacher: nn.Module, images: Tensor, key: str) -> None:
    """Refuse a teacher, `key` in the spec, whose logits of the images are not finite.

    Raises:
        InputError: they are not.
    """
    if not bool(teacher(images).isfinite().all()):
        raise InputError(f"`{key}`: its logits are not finite: give another teacher")


def load_teacher(stored: StoredClassifier, prepared: Prepared, key: str) -> ImageTeacher:
    """A stored classifier as a teacher; `key` in the spec is named in errors.

    Raises:
        InputError: another shape of images, unknown classes. ArtifactError: as `load_classifier`.
    """
    return ImageTeacher(*load_classifier(stored, prepared), prepared, key).eval()
