"""What a worker has in memory: the images of a job on its device, preprocessed."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]

from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.sre2l import require_batch_norm
from stillhouse.distillation.standardise import Standardisation, fit_standardisation
from stillhouse.distillation.stored_images import KIND, read_splits
from stillhouse.distillation.zca import Zca, fit_zca
from stillhouse.errors import ModelError
from stillhouse.models.device import choose_device
from stillhouse.models.networks import build_network
from stillhouse.storage.artifact import Store


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images preprocessed as networks see them, labels, and the way back to pixels.

    Attributes:
        train, validation, test: float32 [N, C, H, W] on the device.
        train_labels, validation_labels, test_labels: int64 [N].
        standardisation: of the training images.
        zca: instead of it, or None.
        class_names: in label order.
        source: name of the images artifact.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor
    standardisation: Standardisation
    zca: Zca | None
    class_names: tuple[str, ...]
    device: torch.device
    source: str

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocessed images back to pixels in about [0, 1]."""
        if self.zca is None:
            return self.standardisation.pixels(images)
        zca = Zca(*(t.to(images) for t in (self.zca.mean, self.zca.matrix, self.zca.inverse)))
        return zca.restore(images)

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


def prepare(store: Store, images: str, *, zca: bool, device: str, gpus: float) -> Prepared:
    """Read an images artifact and preprocess it on the device."""
    splits = read_splits(store, store.get_manifest(KIND, images))
    where = choose_device(device, gpus)
    standardisation = fit_standardisation(splits.train)
    whitening = fit_zca(torch.from_numpy(splits.train.pixels())) if zca else None

    def seen(one: ImageSet) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.ascontiguousarray(one.pixels()))
        shown = standardisation.apply(pixels) if whitening is None else whitening.whiten(pixels)
        return shown.to(where), torch.from_numpy(one.labels).to(where)

    return Prepared(
        *seen(splits.train),
        *seen(splits.validation),
        *seen(splits.test),
        standardisation,
        whitening,
        splits.train.class_names,
        where,
        images,
    )


def check_networks(
    networks: Mapping[str, NetworkSettings], shape: tuple[int, int, int], num_classes: int
) -> None:
    """Build every network of a job once, on the CPU: one that cannot be is found before training.

    Args:
        networks: by key in the spec; batch statistics of those under `teachers` are matched.
        shape: (C, H, W) of the images.
        num_classes: of the images.

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
