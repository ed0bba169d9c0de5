"""The images of a job in the store, and what its workers hold: preprocessed images and teachers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.images import ImageSet, ImageSplits, load_images
from stillhouse.distillation.preprocessing import Standardisation, Zca, fit_standardisation, fit_zca
from stillhouse.distillation.stored_sets import flat_values, lists
from stillhouse.errors import ArtifactError, ModelError
from stillhouse.fingerprint import sha256
from stillhouse.models.device import choose_device, peak_bytes, reset_peak
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.models.networks import build_network
from stillhouse.storage.artifact import Manifest, PartRef, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import parquet_bytes, read_table
from stillhouse.storage.task import Output, Task

IMAGES = "images"
SPLITS = ("train", "validation", "test")
DEAD_LETTERS = "dead_letters.parquet"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Preprocessed images on a device; or vectors, or texts.

    Attributes:
        train, validation, test: float32 [N, C, H, W] and classes int64 [N]; of vectors float32
            [N, D], of texts the tokens int64 [N, T], padded by -1.
        standardisation: of the training images.
        zca: applied instead of it, or None.
        class_names: in label order.
        tokenizer: of texts, its digest.
    """

    train: Tensor
    train_labels: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    standardisation: Standardisation
    zca: Zca | None
    class_names: tuple[str, ...]
    device: torch.device
    tokenizer: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W); (D,) of vectors, (T,) of texts."""
        return tuple(self.train.shape[1:])

    @property
    def preprocessing(self) -> Standardisation | Zca:
        return self.zca or self.standardisation

    def network(self, settings: NetworkSettings, seed: int) -> nn.Module:
        """A fresh network on the device."""
        return build_network(settings, self.shape, self.num_classes, seed).to(self.device)

    def flat(self, settings: NetworkSettings, seed: int) -> FlatModule:
        """A fresh network as a function of its parameters.

        Raises:
            ModelError: it has dropout, so that it is not a function.
        """
        network = self.network(settings, seed)
        for name, module in network.named_modules():
            if isinstance(module, _DropoutNd) and module.p > 0:
                raise ModelError(
                    f"{settings.label} drops out at random ({name}): trajectory matching needs a "
                    "deterministic network; build it without dropout (`network.options`)"
                )
        return FlatModule(network)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What identifies a job's images: artifact, whitening, and digests of the user's own code."""

    images: str
    zca: bool
    code: tuple[str, ...] = ()


def prepare(store: Store, preparation: Preparation, device: torch.device) -> Prepared:
    """Read an images artifact and preprocess it on the device."""
    manifest = store.get_manifest(IMAGES, preparation.images)
    shape, names = manifest.totals["shape"], tuple(manifest.totals["class_names"])
    tables = [read_table(store.path(part.path)) for part in manifest.parts]
    arrays = [flat_values(table, table.column_names[0]).reshape(-1, *shape) for table in tables]
    labels = [table["label"].to_numpy().astype(np.int64) for table in tables]
    sets = [ImageSet(*both, names) for both in zip(arrays, labels, strict=True)]
    standardisation = fit_standardisation(sets[0])
    zca = fit_zca(torch.from_numpy(sets[0].pixels())) if preparation.zca else None
    images = [(zca or standardisation).apply(_as_tensor(one.pixels())) for one in sets]
    train, validation, test = (
        (pixels.to(device), torch.from_numpy(one.labels).to(device))
        for pixels, one in zip(images, sets, strict=True)
    )
    tokenizer = manifest.totals.get("tokenizer", "")
    return Prepared(*train, validation, test, standardisation, zca, names, device, tokenizer)


def _as_tensor(values: NDArray[Any]) -> Tensor:
    """Tokens as int64, which embeddings take."""
    tensor = torch.from_numpy(values)
    return tensor if tensor.is_floating_point() else tensor.long()


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher that the job trained: its settings, and the name of its weights in the store."""

    network: NetworkSettings
    weights: str

    def uri(self, store: Store) -> str:
        """Where its artifact lies."""
        return store.path("models", self.weights)

    def load(self, host: "ImageHost") -> nn.Module:
        """The network on the device; ArtifactError where its weights are missing."""
        network, uri = host.prepared.network(self.network, 0), f"{self.uri(host.store)}/{WEIGHTS}"
        try:
            network.load_state_dict(load(read_bytes(uri)))
        except FileNotFoundError as error:
            raise ArtifactError(f"{uri} is missing, the weights of a teacher") from error
        return network


class _AnyTeacher(Protocol):
    """A teacher by the name of its weights."""

    @property
    def weights(self) -> str: ...

    def load(self, host: "ImageHost") -> nn.Module: ...


@dataclass(frozen=True, slots=True)
class ImageHostSettings:
    """What a worker's host is built from; `networks` are all that the job builds, by key."""

    preparation: Preparation
    device: str = "cpu"
    gpus: float = 0
    threads: int | None = None
    networks: Mapping[str, NetworkSettings] = field(default_factory=dict[str, NetworkSettings])

    def build(self, store: Store) -> "ImageHost":
        return ImageHost(store, self)


class ImageHost:
    """A worker's prepared images and teachers, each loaded on first use."""

    def __init__(self, store: Store, settings: ImageHostSettings) -> None:
        self.store = store
        self._settings = settings
        self.teachers: dict[str, nn.Module] = {}
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

    @cached_property
    def prepared(self) -> Prepared:
        """The job's images; ModelError where one of its networks cannot be built for them."""
        settings = self._settings
        prepared = prepare(
            self.store, settings.preparation, choose_device(settings.device, settings.gpus)
        )
        check_networks(settings.networks, prepared.shape, prepared.num_classes)
        return prepared

    def teacher(self, teacher: _AnyTeacher) -> nn.Module:
        """A teacher, frozen, on the device; loaded once."""
        key = teacher.weights
        if key not in self.teachers:
            self.teachers[key] = frozen(teacher.load(self))
        return self.teachers[key]


def frozen(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, without gradients of its parameters."""
    return network.eval().requires_grad_(False)


def check_networks(
    networks: Mapping[str, NetworkSettings], shape: tuple[int, ...], num_classes: int
) -> None:
    """Build every network once on the CPU, so that a failure comes before any training.

    Raises:
        ModelError: a network cannot be built, or a teacher has no batch norm; names its key.
    """
    for key, settings in networks.items():
        try:
            network = build_network(settings, shape, num_classes, 0)
        except ModelError as error:
            raise ModelError(f"`{key}`: {error}") from error
        if key.startswith("teachers."):
            require_batch_norm(network, f"`{key}`")


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch norm layers with running statistics, in the order of modules."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [layer for layer in layers if layer.running_mean is not None]


def require_batch_norm(network: nn.Module, place: str) -> None:
    """Refuse a teacher without running statistics; ModelError names its `place`."""
    if not batch_norms(network):
        raise ModelError(
            f"{place} has no batch statistics to match: give a network with `norm: batch`"
        )


@dataclass(frozen=True)
class ImageTask(Task):
    """Work on a job's images; a subclass is a frozen dataclass with a `make`."""

    KIND: ClassVar[str] = "distilled"

    preparation: Preparation

    def make(self, host: ImageHost) -> Output:
        raise NotImplementedError

    def run(self, store: Store, host: ImageHost, loaded: object = None) -> Output:
        """`make`, with the seconds and the peak memory that it took in `info`."""
        device = host.prepared.device
        reset_peak(device)
        started = perf_counter()
        made = self.make(host)
        took = {"seconds": perf_counter() - started, "peak_bytes": peak_bytes(device)}
        return replace(made, info={**made.info, **took})


def file_part(path: str, data: bytes, num_rows: int) -> PartRef:
    """A file as a part of a receipt, so that the task is done again if the file is deleted."""
    return PartRef(path, num_rows, 0, len(data), sha256(data))


@dataclass(frozen=True)
class ImagesTask(ImageTask):
    """Reads, checks and splits a source: the artifact `images/<fingerprint>`.

    It is named by the files' content and the settings that read them. Its three parts (train,
    validation, test) have a row an image: `pixels` fixed_size_list<uint8, C*H*W>, `label` int32;
    vectors have `values` (float32) instead of pixels, texts `tokens` (int32). What could not be
    read is listed in `dead_letters.parquet` (file, row, reason).
    """

    KIND: ClassVar[str] = IMAGES

    data: ImageData

    @property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.preparation.images

    @property
    def facts(self) -> dict[str, str]:
        """More of the manifest's totals."""
        return {}

    def read(self) -> ImageSplits:
        """The three sets."""
        return load_images(self.data)

    def run(self, store: Store, host: ImageHost, loaded: object = None) -> Output:
        """Commit the artifact.

        Raises:
            InputError: as `load_images`.
        """
        name, splits = self.fingerprint, self.read()
        sets = [splits.train, splits.validation, splits.test]
        parts = [
            store.put_part(
                f"{IMAGES}/parts/{name}-{split}.parquet", images_table(one), num_tokens=0
            )
            for split, one in zip(SPLITS, sets, strict=True)
        ]
        letters = [asdict(letter) for one in sets for letter in one.dead_letters]
        files: dict[str, str] = {}
        if letters:
            table = parquet_bytes(pa.Table.from_pylist(letters))
            stored = create_or_adopt(store.path(IMAGES, name, DEAD_LETTERS), table)
            files[DEAD_LETTERS] = sha256(stored)
        totals = {
            "shape": list(splits.train.shape),
            "class_names": list(splits.train.class_names),
            "least_per_class": int(np.bincount(splits.train.labels).min()),
            "dead_letters": len(letters),
            **self.facts,
        }
        settings = self.data.identity()
        manifest = store.put_manifest(
            Manifest(IMAGES, name, tuple(parts), {}, settings, totals, {}, files)
        )
        return Output(counts={"images": manifest.num_rows}, parts=manifest.parts)


def images_table(images: ImageSet) -> pa.Table:
    """The rows of a part of an images artifact."""
    name = {"image": "pixels", "vector": "values", "text": "tokens"}[images.noun]
    values = lists(images.images.reshape(len(images), -1))
    return pa.table({name: values, "label": pa.array(images.labels.astype(np.int32))})
