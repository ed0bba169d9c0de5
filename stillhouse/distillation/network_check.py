"""Every network of a spec built once, so that one that cannot be is found before any training."""

from dataclasses import dataclass

from stillhouse.distillation.spec import NetworkSettings
from stillhouse.distillation.sre2l import require_batch_norm
from stillhouse.errors import ModelError
from stillhouse.models.networks import build_network
from stillhouse.storage.artifact import Receipt, Store

KIND = "distilled"


@dataclass(frozen=True, slots=True)
class NetworkTask:
    """Networks to build.

    Attributes:
        fingerprint: its receipt's name.
        networks: each with its key in the spec.
        teachers: such of which batch statistics are matched.
        shape: (C, H, W) of the images.
        num_classes: of the images.
    """

    fingerprint: str
    networks: tuple[tuple[str, NetworkSettings], ...]
    teachers: tuple[tuple[str, NetworkSettings], ...]
    shape: tuple[int, int, int]
    num_classes: int


def run_networks(store: Store, task: NetworkTask) -> Receipt:
    """Build them on the CPU, one after another; a receipt says that they can be.

    Raises:
        ModelError: naming the key of the first that cannot, or of a teacher without batch norm.
    """
    for key, settings in (*task.networks, *task.teachers):
        try:
            network = build_network(settings, task.shape, task.num_classes, 0)
        except ModelError as error:
            raise ModelError(f"`{key}`: {error}") from error
        if (key, settings) in task.teachers:
            require_batch_norm(network, f"`{key}`")
    return store.put_receipt(KIND, Receipt(task.fingerprint, ()))
