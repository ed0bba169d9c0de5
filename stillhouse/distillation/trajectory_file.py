"""One expert's trajectory in one file: a JSON header, then a flat array, memory-mapped.

    8 bytes    magic
    8 bytes    length of the header, little-endian
    header     canonical JSON, padded with spaces so that the array starts at a multiple of 64
    array      snapshots [E, P], float32 or bfloat16, little-endian, row by row

The header names the network's tensors and their shapes, the epochs, and the SHA-256 of every
snapshot, which is checked when the snapshot is read. The same snapshots give the same bytes.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.distillation.functional import FlatModule
from stillhouse.errors import ArtifactError
from stillhouse.fingerprint import canonical_json, sha256

StoredDtype = Literal["float32", "bfloat16"]

_MAGIC = b"stilltr1"
_ALIGNMENT = 64
_PREFIX = struct.Struct("<8sQ")
_STORED_AS = {"float32": np.dtype("<i4"), "bfloat16": np.dtype("<i2")}
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def encode_trajectory(
    network: FlatModule, snapshots: Mapping[int, Tensor], dtype: StoredDtype = "float32"
) -> bytes:
    """The file's bytes for snapshots [P] by epoch."""
    epochs = sorted(snapshots)
    rows = [_row_bytes(snapshots[epoch], dtype) for epoch in epochs]
    header = canonical_json(
        {
            "dtype": dtype,
            "epochs": epochs,
            "names": network.names,
            "shapes": network.shapes,
            "sha256": [sha256(row) for row in rows],
        }
    )
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGNMENT)
    return b"".join([_PREFIX.pack(_MAGIC, len(header)), header, *rows])


def _row_bytes(parameters: Tensor, dtype: StoredDtype) -> bytes:
    stored = parameters.detach().to("cpu", _TORCH[dtype]).contiguous()
    integers = stored.view(torch.int32 if dtype == "float32" else torch.int16)
    return integers.numpy().astype(_STORED_AS[dtype]).tobytes()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """An open file: `epochs` are those stored, `array` the snapshots' bits [E, P] on disk.

    `place` is what messages call it; the file itself may be a copy.
    """

    place: str
    dtype: StoredDtype
    epochs: tuple[int, ...]
    checksums: tuple[str, ...]
    array: np.ndarray

    def snapshot(self, epoch: int) -> Tensor:
        """The parameters after `epoch` epochs: float32 [P], a copy.

        Raises:
            ArtifactError: the epoch is not stored, or its bytes are not those that were written.
        """
        self.require([epoch])
        index = self.epochs.index(epoch)
        row = np.array(self.array[index])
        if sha256(row.tobytes()) != self.checksums[index]:
            raise ArtifactError(
                f"{self.place}: epoch {epoch} is not what was written (checksum): delete the file "
                "and run again, the expert is then trained anew"
            )
        native = row.astype(row.dtype.newbyteorder("="))
        return torch.from_numpy(native).view(_TORCH[self.dtype]).float()

    def require(self, epochs: Iterable[int]) -> None:
        """Refuse a trajectory that lacks one of some epochs.

        Raises:
            ArtifactError: naming the first one, and those that are stored.
        """
        missing = next((epoch for epoch in epochs if epoch not in self.epochs), None)
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


def open_trajectory(path: Path, network: FlatModule, place: str | None = None) -> Trajectory:
    """Map a trajectory of `network`; the array is read only where snapshots are asked for.

    Messages call it `place`, by default its path.

    Raises:
        ArtifactError: no trajectory, cut short, or one of another network.
    """
    place = place or str(path)
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            raise ArtifactError(f"{place} is no expert trajectory")
        (_, length) = _PREFIX.unpack(prefix)
        text = file.read(length)
    if len(text) < length:
        raise ArtifactError(f"{place} is cut short: delete it and run again")
    header = json.loads(text)
    _check_network(place, header["names"], header["shapes"], network)
    dtype: StoredDtype = header["dtype"]
    size = (len(header["epochs"]), network.num_parameters)
    start, stored = _PREFIX.size + length, _STORED_AS[dtype]
    if path.stat().st_size != start + prod(size) * stored.itemsize:
        raise ArtifactError(f"{place} is cut short: delete it and run again")
    array = np.memmap(path, stored, "r", start, size)
    return Trajectory(place, dtype, tuple(header["epochs"]), tuple(header["sha256"]), array)


def _check_network(
    place: str, names: Sequence[str], shapes: Sequence[Sequence[int]], network: FlatModule
) -> None:
    """Name the first tensor in which the file's network is another."""
    own = dict(zip(network.names, network.shapes, strict=True))
    stored = {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}
    for name in [*stored, *own]:
        if stored.get(name) != own.get(name):
            raise ArtifactError(
                f"{place} is of another network: {name} is {stored.get(name, 'absent')} there and "
                f"{own.get(name, 'absent')} in `network`: give the experts' own, or train new ones"
            )
    if tuple(stored) != network.names:
        raise ArtifactError(f"{place} is of another network: its tensors have another order")
