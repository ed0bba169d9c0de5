"""What a worker of a distillation holds: the job's images on its device, preprocessed; teachers.

Images are standardised (mean and deviation a channel) or whitened by ZCA, as trajectory matching
uses it:

    mu = mean of the columns of X [N, C*H*W],  Sigma = (X - mu)^T (X - mu) / (N - 1) = U diag(s) U^T
    W  = U diag((s + eps)^(-1/2)) U^T,         output (x - mu) W

with eps = 0.1 on pixels in [0, 1]. Both are fitted on the training images alone; experts and
synthetic images must both be whitened, or neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.stored_sets import flat_values
from stillhouse.errors import ArtifactError, ModelError
from stillhouse.models.device import choose_device
from stillhouse.models.networks import build_network
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.parquet import read_table

IMAGES = "images"
"""Kind of the artifact of a job's images: parts of training, validation and test images."""
WEIGHTS = "weights.safetensors"
_SMALLEST_STD = 1 / 255  # of a channel that never changes
_ZCA_EPS = 0.1


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Per channel (pixel - mean) / std, pixels in [0, 1]; one number a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels [..., C, H, W] in [0, 1] -> what a network is given."""
        mean, std = self._tensors(pixels)
        return (pixels - mean) / std

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of `apply`, not clipped."""
        mean, std = self._tensors(images)
        return images * std + mean

    def clip(self, images: Tensor) -> Tensor:
        """Standardised images [..., C, H, W] moved into the range of pixels."""
        mean, std = self._tensors(images)
        return torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std)

    def to_bytes(self, images: Tensor) -> Tensor:
        """Standardised images as uint8 pixels, rounded: what is stored."""
        return (self.pixels(images) * 255).round().clamp(0, 255).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """As it is stored with a set."""
        return {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std)}

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1)
        mean = torch.tensor(self.mean, dtype=like.dtype, device=like.device).view(shape)
        return mean, torch.tensor(self.std, dtype=like.dtype, device=like.device).view(shape)


def fit_standardisation(images: ImageSet) -> Standardisation:
    """Mean and biased standard deviation of each channel over all pixels of the training images."""
    channels = [images.images[:, channel] for channel in range(images.shape[0])]
    means = [float(values.mean(dtype=np.float64)) / 255 for values in channels]
    stds = [float(values.std(dtype=np.float64)) / 255 for values in channels]
    return Standardisation(tuple(means), tuple(max(std, _SMALLEST_STD) for std in stds))


@dataclass(frozen=True, slots=True)
class Zca:
    """mu [D], W [D, D] and its inverse, for images of D = C*H*W values."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def apply(self, pixels: Tensor) -> Tensor:
        """Images [N, C, H, W] with pixels in [0, 1] to whitened ones."""
        return ((pixels.flatten(1) - self.mean) @ self.matrix).view_as(pixels)

    def pixels(self, images: Tensor) -> Tensor:
        """Whitened images [N, C, H, W] back to pixels, to be looked at."""
        mean, inverse = self.mean.to(images), self.inverse.to(images)
        return (images.flatten(1) @ inverse + mean).view_as(images)

    def tensors(self) -> dict[str, Tensor]:
        """As it is stored with a set."""
        return {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}


def fit_zca(images: Tensor, eps: float = _ZCA_EPS) -> Zca:
    """The whitening of images [N, C, H, W]. Decomposed in float64: O(N D^2 + D^3)."""
    rows = images.flatten(1).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / (len(rows) - 1))
    spread = (values.clamp(min=0) + eps).sqrt()
    matrix = (vectors / spread) @ vectors.T
    inverse = (vectors * spread) @ vectors.T
    return Zca(mean.to(images.dtype), matrix.to(images.dtype), inverse.to(images.dtype))


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images preprocessed as networks see them, labels, and the way back to pixels.

    Attributes:
        train, validation, test: float32 [N, C, H, W] and classes int64 [N], on the device.
        standardisation: of the training images.
        zca: instead of it, or None.
        class_names: in label order.
    """

    train: Tensor
    train_labels: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    standardisation: Standardisation
    zca: Zca | None
    class_names: tuple[str, ...]
    device: torch.device

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    @property
    def preprocessing(self) -> Standardisation | Zca:
        """What turned pixels into images, and turns them back."""
        return self.zca or self.standardisation

    def network(self, settings: NetworkSettings, seed: int) -> nn.Module:
        """A fresh network on the device."""
        return build_network(settings, self.shape, self.num_classes, seed).to(self.device)

    def flat(self, settings: NetworkSettings, seed: int) -> FlatModule:
        """The same as a function of one vector of parameters.

        Raises:
            ModelError: it has dropout, so that two calls would be two functions.
        """
        network = self.network(settings, seed)
        for name, module in network.named_modules():
            if isinstance(module, _DropoutNd) and module.p > 0:
                raise ModelError(
                    f"{settings.label} drops out at random ({name}): a trajectory is walked twice "
                    "and has to be the same; build it without dropout (`network.options`)"
                )
        return FlatModule(network)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a job's images are: name of their artifact, whitened or not, and the user's own code.

    Part of every task's identity; `code` holds digests.
    """

    images: str
    zca: bool
    code: tuple[str, ...] = ()


def prepare(store: Store, given: Preparation, device: torch.device) -> Prepared:
    """Read an images artifact and preprocess it on the device."""
    manifest = store.get_manifest(IMAGES, given.images)
    shape, names = manifest.totals["shape"], tuple(manifest.totals["class_names"])
    tables = [read_table(store.path(part.path)) for part in manifest.parts]
    sets = [
        ImageSet(
            flat_values(table, "pixels").reshape(-1, *shape),
            table["label"].to_numpy().astype(np.int64),
            names,
        )
        for table in tables
    ]
    standardisation = fit_standardisation(sets[0])
    zca = fit_zca(torch.from_numpy(sets[0].pixels())) if given.zca else None
    seen = [(zca or standardisation).apply(torch.from_numpy(one.pixels())) for one in sets]
    train, validation, test = (
        (images.to(device), torch.from_numpy(one.labels).to(device))
        for images, one in zip(seen, sets, strict=True)
    )
    return Prepared(*train, validation, test, standardisation, zca, names, device)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A trained network: what it is, and the name of its weights in the store."""

    network: NetworkSettings
    weights: str


@dataclass(frozen=True, slots=True)
class ImageHostSettings:
    """What a worker of a job is built from; `networks` are all that the job builds, by key."""

    given: Preparation
    device: str = "cpu"
    gpus: float = 0
    threads: int | None = None
    networks: Mapping[str, NetworkSettings] = field(default_factory=dict[str, NetworkSettings])

    def build(self, store: Store) -> "ImageHost":
        """In the worker."""
        return ImageHost(store, self)


class ImageHost:
    """Hosts the prepared images of a job and its teachers, loaded with the first task to need them.

    Whoever has other images in memory, or teachers of no store, sets them.
    """

    def __init__(self, store: Store, settings: ImageHostSettings) -> None:
        self.store = store
        self._settings = settings
        self.teachers: dict[str, nn.Module] = {}
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)

    @cached_property
    def prepared(self) -> Prepared:
        """The job's images; ModelError where one of its networks cannot be built for them."""
        asked = self._settings
        found = prepare(self.store, asked.given, choose_device(asked.device, asked.gpus))
        check_networks(asked.networks, found.shape, found.num_classes)
        return found

    def teacher(self, teacher: Teacher) -> nn.Module:
        """A stored teacher on the device, `frozen`; ArtifactError where its weights are missing."""
        key, uri = teacher.weights, self.store.path("models", teacher.weights, WEIGHTS)
        if key not in self.teachers:
            network = self.prepared.network(teacher.network, 0)
            try:
                network.load_state_dict(load(read_bytes(uri)))
            except FileNotFoundError as error:
                raise ArtifactError(f"{uri} is missing, the weights of a teacher") from error
            self.teachers[key] = frozen(network)
        return self.teachers[key]


def frozen(network: nn.Module) -> nn.Module:
    """The same network in evaluation mode, its parameters without gradients: a teacher."""
    return network.eval().requires_grad_(False)


def check_networks(
    networks: Mapping[str, NetworkSettings], shape: tuple[int, int, int], num_classes: int
) -> None:
    """Build every network of a job once, on the CPU: one that cannot be is found before training.

    Raises:
        ModelError: naming the key of the first that cannot, or of a teacher without batch norm.
    """
    for key, settings in networks.items():
        try:
            network = build_network(settings, shape, num_classes, 0)
        except ModelError as error:
            raise ModelError(f"`{key}`: {error}") from error
        if key.startswith("teachers."):
            require_batch_norm(network, f"`{key}`")


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Its batch norm layers with running statistics, in the order of its modules."""
    modules = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    return [layer for layer in modules if layer.running_mean is not None]


def require_batch_norm(network: nn.Module, place: str) -> None:
    """The network has batch norm layers with running statistics.

    Raises:
        ModelError: it has none; `place` names the teacher.
    """
    if not batch_norms(network):
        raise ModelError(
            f"{place} has no batch statistics to match: give a network with `norm: batch`"
        )
