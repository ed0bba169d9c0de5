"""Experts: networks trained on real images, whose parameters are kept after each epoch.

A trajectory is the artifact `trajectories/<fingerprint>`: a safetensors file with a tensor [P] an
epoch, read by memory map. Its metadata hold the names and shapes of the network's tensors and the
SHA-256 of every snapshot, which is checked when the snapshot is read.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from stillhouse.distillation.adjoint import FlatModule
from stillhouse.distillation.augment import augment, draw_augmentation
from stillhouse.distillation.methods.ast import clip_factor, gradient_penalty
from stillhouse.distillation.methods.ftd import gsam_direction
from stillhouse.distillation.prepared import ImageHost, ImageTask, file_part
from stillhouse.distillation.recipes import Group
from stillhouse.distillation.spec import ExpertSettings
from stillhouse.errors import ArtifactError, DivergedError
from stillhouse.fingerprint import canonical_json, sha256
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import join
from stillhouse.storage.folders import local_folder
from stillhouse.storage.task import Output

TRAJECTORIES = "trajectories"
FILE = "trajectory.safetensors"
_KEY = "trajectory"


def resolved(
    settings: ExpertSettings, default: Literal["plain", "smooth", "flat"] = "plain"
) -> ExpertSettings:
    """The settings with all defaults filled in; `default` is the kind of `smoothing: auto`.

    Plain experts are MTT's, smooth ones AST's, flat ones FTD's.
    """
    kind = default if settings.smoothing.kind == "auto" else settings.smoothing.kind
    values = {"learning_rate": 0.01, "momentum": 0.0, "weight_decay": 0.0, "drop_factor": 0.1}
    smoothing = {"ramp_epochs": 0, "penalty_weight": 0.0}
    if kind == "smooth":
        values = {"learning_rate": 0.003, "momentum": 0.9, "weight_decay": 1e-3, "drop_factor": 0.6}
        values["drop_epoch"] = settings.epochs // 2 + 1
        smoothing = {"ramp_epochs": 10, "penalty_weight": 2.0}
    if kind == "flat":
        smoothing["rho"] = 0.01
    smoothing |= settings.smoothing.model_dump(exclude_none=True) | {"kind": kind}
    filled = values | settings.model_dump(exclude_none=True) | {"smoothing": smoothing}
    return ExpertSettings.model_validate(filled)


def train_expert(
    network: FlatModule,
    images: Tensor,
    labels: Tensor,
    settings: ExpertSettings,
    groups: Sequence[Group],
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, float]]:
    """SGD from the module's own parameters.

    Args:
        network, images, labels: on one device; images [N, C, H, W] preprocessed, classes [N].
        settings: `resolved`.
        groups: of DSA, one drawn a batch; none: plain images.
        generator: on the CPU; draws the order and the augmentation.

    Yields:
        After each epoch the parameters [P] and the mean training loss.

    Raises:
        DivergedError: the parameters are no longer finite.
    """
    theta = network.parameters()
    velocity = torch.zeros_like(theta)
    rate, momentum, decay = settings.learning_rate, settings.momentum, settings.weight_decay
    assert rate is not None and momentum is not None and decay is not None
    for epoch in range(settings.epochs):
        if epoch == settings.drop_epoch:
            rate *= settings.drop_factor or 1.0
            velocity = torch.zeros_like(theta)
        total = torch.zeros((), device=images.device)
        order = torch.randperm(len(images), generator=generator)
        for rows in order.to(images.device).split(settings.batch_size):
            loss_at = expert_loss(
                network, images[rows], labels[rows], epoch, settings, groups, generator
            )
            direction, loss = _direction(loss_at, theta, settings)
            velocity = momentum * velocity + direction + decay * theta
            theta = theta - rate * velocity
            total += loss * len(rows)
        mean = float(total) / len(images)
        if not torch.isfinite(theta).all():
            raise DivergedError(
                f"an expert's loss is {mean} in epoch {epoch + 1} at learning rate {rate:.3g}: "
                "lower `experts.learning_rate`"
            )
        yield theta, mean


def expert_loss(
    network: FlatModule,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    settings: ExpertSettings,
    groups: Sequence[Group],
    generator: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    """A batch's training loss as a function of theta [P], with a fixed augmentation."""
    augmented = images
    if groups:
        draw = draw_augmentation(groups, len(images), images.shape[2], generator)
        augmented = augment(images, draw)
    factor = clip_factor(epoch, settings.smoothing.ramp_epochs or 0)
    penalty = settings.smoothing.penalty_weight

    def loss_at(theta: Tensor) -> Tensor:
        loss = factor * cross_entropy(network(theta, augmented), labels)
        if not penalty:
            return loss
        return loss + gradient_penalty(lambda inputs: network(theta, inputs), images, penalty)

    return loss_at


def _direction(
    loss_at: Callable[[Tensor], Tensor], theta: Tensor, settings: ExpertSettings
) -> tuple[Tensor, Tensor]:
    """The gradient or GSAM's direction at theta, and the loss there."""
    losses: list[Tensor] = []

    def gradient_at(point: Tensor) -> Tensor:
        leaf = point.detach().requires_grad_()
        loss = loss_at(leaf)
        losses.append(loss.detach())
        return torch.autograd.grad(loss, leaf)[0]

    rho, alpha = settings.smoothing.rho, settings.smoothing.alpha
    if rho is None:
        return gradient_at(theta), losses[0]
    return gsam_direction(gradient_at, theta, rho=rho, alpha=alpha), losses[0]


@dataclass(frozen=True)
class ExpertTask(ImageTask):
    """Trains an expert; `settings` are resolved, `keep` are the stored epochs (0: the start)."""

    KIND: ClassVar[str] = TRAJECTORIES

    network: NetworkSettings
    settings: ExpertSettings
    groups: tuple[Group, ...]
    keep: tuple[int, ...]

    def make(self, host: ImageHost) -> Output:
        """Train and commit the trajectory."""
        prepared, seed = host.prepared, self.settings.seed
        network = prepared.flat(self.network, seed)
        generator = torch.Generator().manual_seed(seed)
        snapshots, losses = {0: network.parameters()}, list[float]()
        training = train_expert(
            network, prepared.train, prepared.train_labels, self.settings, self.groups, generator
        )
        for theta, loss in training:
            losses.append(loss)
            snapshots[len(losses)] = theta
            if len(losses) >= self.keep[-1]:
                break
        kept = {epoch: snapshots[epoch] for epoch in self.keep}
        path = f"{TRAJECTORIES}/{self.fingerprint}/{FILE}"
        encoded = encode_trajectory(network, kept, self.settings.stored_as)
        stored = create_or_adopt(host.store.path(path), encoded)
        host.store.put_manifest(
            Manifest(
                TRAJECTORIES,
                self.fingerprint,
                (),
                {"images": self.preparation.images},
                {"network": self.network.model_dump(), "seed": seed, "zca": self.preparation.zca},
                {"epochs": list(self.keep), "losses": losses, "bytes": len(stored)},
                files={FILE: sha256(stored)},
            )
        )
        counts = {"images": len(prepared.train) * len(losses), "bytes": len(stored)}
        part = file_part(path, stored, len(kept))
        return Output(counts=counts, info={"losses": losses}, parts=(part,))


def encode_trajectory(
    network: FlatModule,
    snapshots: Mapping[int, Tensor],
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> bytes:
    """The file of snapshots [P] by epoch; deterministic."""
    stored = {
        str(epoch): snapshots[epoch].detach().to("cpu", getattr(torch, dtype)).contiguous().clone()
        for epoch in sorted(snapshots)
    }
    digests = {epoch: _digest(row) for epoch, row in stored.items()}
    about = {"names": network.names, "shapes": network.shapes, "sha256": digests}
    return save(stored, {_KEY: canonical_json(about).decode()})


def _digest(row: Tensor) -> str:
    return sha256(row.view(torch.uint8).numpy().tobytes())


class Trajectory:
    """An open file of snapshots of `network`; messages call it `place`.

    Raises:
        ArtifactError: no trajectory, a truncated one, or one of another network.
    """

    def __init__(self, path: Path, network: FlatModule, place: str | None = None) -> None:
        self.place = place or str(path)
        try:
            self._file: Any = safe_open(str(path), "pt")
            about = json.loads((self._file.metadata() or {})[_KEY])
        except (SafetensorError, KeyError) as error:
            raise ArtifactError(
                f"{self.place} is no expert's trajectory, or cut short: delete it and run again"
            ) from error
        self._sha256: dict[int, str] = {int(n): digest for n, digest in about["sha256"].items()}
        self.epochs = tuple(sorted(self._sha256))
        expected = dict(zip(network.names, network.shapes, strict=True))
        stored = {n: tuple(s) for n, s in zip(about["names"], about["shapes"], strict=True)}
        for name in [*stored, *expected]:
            if stored.get(name) != expected.get(name):
                raise ArtifactError(
                    f"{self.place} is of another network: {name} is {stored.get(name, 'absent')} "
                    f"there and {expected.get(name, 'absent')} in `network`: give the experts' "
                    "own, or train new ones"
                )
        if tuple(stored) != network.names:
            raise ArtifactError(
                f"{self.place} is of another network: its tensors have another order"
            )

    def snapshot(self, epoch: int) -> Tensor:
        """The parameters after `epoch` epochs: float32 [P], a copy.

        Raises:
            ArtifactError: the epoch is not stored, or its checksum is wrong.
        """
        self.require([epoch])
        row: Tensor = self._file.get_tensor(str(epoch))
        if _digest(row) != self._sha256[epoch]:
            raise ArtifactError(
                f"{self.place}: the checksum of epoch {epoch} is wrong: delete the file and run "
                "again, the expert is then trained anew"
            )
        return row.to(torch.float32, copy=True)

    def require(self, epochs: Iterable[int]) -> None:
        """Refuse a trajectory without all of some epochs.

        Raises:
            ArtifactError: naming the first missing epoch, and those that are stored.
        """
        missing = next((epoch for epoch in epochs if epoch not in self._sha256), None)
        if missing is not None:
            raise ArtifactError(
                f"{self.place} holds epochs {_ranges(self.epochs)}, not {missing}: train experts "
                "with more `experts.epochs` or `keep: all`, or move the starts by "
                "`method.max_start_epoch` and `min_start_epoch`"
            )


def _ranges(epochs: Sequence[int]) -> str:
    """`0 to 7, 15`."""
    starts = [epoch for epoch in epochs if epoch - 1 not in epochs]
    ends = [epoch for epoch in epochs if epoch + 1 not in epochs]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in pairs)


def open_trajectories(
    uris: Sequence[str], network: FlatModule, opened: ExitStack
) -> list[Trajectory]:
    """Trajectories, mapped from local disk; copies of remote ones live as long as `opened`.

    Raises:
        ArtifactError: one is missing, or as `Trajectory`.
    """
    trajectories: list[Trajectory] = []
    for uri in uris:
        path = Path(opened.enter_context(local_folder(uri, (FILE,)))) / FILE
        if not path.exists():
            raise ArtifactError(f"{uri} holds no {FILE}: it is no expert's trajectory")
        trajectories.append(Trajectory(path, network, join(uri, FILE)))
    return trajectories
