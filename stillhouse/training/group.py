"""The workers of one training: sums over them, and values gathered from them.

A training is shared in one of two ways; both give every worker the mean over the global batch:

* replicated: every worker has the whole model. Gradients are summed once, after the last
  micro-batch, in large buckets: a worker that runs out of memory before can halve its micro-batch
  on its own, for no other waits for it inside a backward pass.
* sharded (FSDP2): every worker keeps its share of weights, gradients and moments, and layers are
  gathered when they are needed. All workers have to run the same micro-batches.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from stillhouse.errors import LostPeerError

_BUCKET_BYTES = 64 << 20


class WorkerGroup:
    """All workers of a training, as one of them sees them; by default it is the only one.

    Attributes:
        gradient_factor: to multiply a worker's objective by: FSDP2 averages gradients over workers.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, sharded: bool = False) -> None:
        self.rank, self.size = rank, size
        self.sharded = sharded and size > 1
        self.gradient_factor = size if self.sharded else 1
        self._messages: Any = dist.new_group(backend="gloo") if size > 1 else None
        self._rows: list[int] | None = None

    @classmethod
    def current(cls, *, sharded: bool = False) -> "WorkerGroup":
        """The workers of torch's default process group; all of them have to call this."""
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), sharded=sharded)

    def total(self, value: Tensor) -> Tensor:
        """The sum of the workers' tensors, in place."""
        if self.size > 1:
            with _collective():
                dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of a replicated model in place, to equal bits on all workers."""
        self.sum_tensors([p.grad for p in parameters if p.grad is not None])

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """The same for tensors, which every worker has as many of; none where sharded."""
        if self.size == 1 or self.sharded:
            return
        buckets: list[list[Tensor]] = [[]]
        num_bytes = 0
        for gradient in tensors:
            if buckets[-1] and num_bytes + gradient.nbytes > _BUCKET_BYTES:
                buckets.append([])
                num_bytes = 0
            buckets[-1].append(gradient)
            num_bytes += gradient.nbytes
        for bucket in buckets:
            flat = self.total(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            sizes = [gradient.numel() for gradient in bucket]
            for gradient, summed in zip(bucket, flat.split(sizes), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def batch_rows(self, mine: int) -> list[int]:
        """Rows of a batch on each worker; they never change, so they are gathered once."""
        if self._rows is None:
            self._rows = self.gather(mine)
        return self._rows

    def gather_samples(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples [B, 2] of a global batch, from those of each worker."""
        if self.size == 1:
            return samples
        rows = self.batch_rows(len(samples))
        return self.gather_rows(torch.from_numpy(samples), rows).numpy()

    def gather_rows(self, mine: Tensor, rows: Sequence[int]) -> Tensor:
        """The workers' CPU tensors [b, m] as one [B, m]; `rows` are the b of each worker."""
        if self.size == 1:
            return mine
        block = torch.zeros(max(rows), *mine.shape[1:], dtype=mine.dtype)
        block[: len(mine)] = mine
        blocks = self.gather_blocks(block).split(max(rows))
        return torch.cat([block[:n] for block, n in zip(blocks, rows, strict=True)])

    def gather_blocks(self, block: Tensor) -> Tensor:
        """The workers' CPU tensors, of one shape, concatenated along the first axis."""
        if self.size == 1:
            return block
        blocks = [torch.empty_like(block) for _ in range(self.size)]
        with _collective():
            dist.all_gather(blocks, block, group=self._messages)
        return torch.cat(blocks)

    def gather(self, value: Any) -> list[Any]:
        """Small plain values of all workers, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(values, value, group=self._messages)
        return values


@contextmanager
def _collective() -> Generator[None]:
    """Errors in here are of another worker, or of the connection to it."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(str(error)) from error


def shard(module: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Shard the weights of `module` over all workers (FSDP2), layer by layer, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; then all workers call this together."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    return tensor if gathered is None else gathered()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor on the device of `parameter`, and sharded as it is."""
    moved = tensor.to(parameter.device)
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None or moved.dim() == 0:
        return moved
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(parameter, "placements", None)
    return distribute_tensor(moved, mesh, placements, src_data_rank=None)
