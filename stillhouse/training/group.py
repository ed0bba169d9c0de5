"""The workers of one training: what they add up, and what they tell each other.

Two ways to share a training out; both give every worker the mean over the global batch:

* replicated: every worker has the whole model. Gradients are added up once, after the last
  micro-batch and in large buckets, so that a worker which ran out of memory in between can halve
  its micro-batch on its own: nobody waits for it inside a backward pass.
* sharded (FSDP2): every worker keeps its share of weights, gradients and moments, and layers are
  gathered as they are needed. Here all workers have to take the same micro-batches.
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
    """All workers of a training, as one of them sees them. Made without arguments: it is alone."""

    def __init__(self, *, rank: int = 0, size: int = 1, sharded: bool = False) -> None:
        self.rank, self.size = rank, size
        self.sharded = sharded and size > 1
        self._messages: Any = dist.new_group(backend="gloo") if size > 1 else None
        self._rows: list[int] | None = None

    @classmethod
    def current(cls, *, sharded: bool = False) -> "WorkerGroup":
        """The workers of torch's default process group; all of them have to call this."""
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), sharded=sharded)

    @property
    def gradient_factor(self) -> int:
        """What a worker's objective is multiplied with: FSDP2 divides sums by the workers."""
        return self.size if self.sharded else 1

    def total(self, value: Tensor) -> Tensor:
        """The sum of the workers' tensors, in place."""
        if self.size > 1:
            with _collective():
                dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of a replicated model, in place; equal bits on all workers."""
        if self.size == 1 or self.sharded:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = self.total(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            sizes = [gradient.numel() for gradient in bucket]
            for gradient, summed in zip(bucket, flat.split(sizes), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def batch_rows(self, mine: int) -> list[int]:
        """Rows of a batch that each worker has; always the same, so they are asked for once."""
        if self._rows is None:
            self._rows = self.gather(mine)
        return self._rows

    def gather_samples(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples [B, 2] of a global batch, from those of each worker."""
        if self.size == 1:
            return samples
        rows = self.batch_rows(len(samples))
        mine = torch.zeros(max(rows), 2, dtype=torch.int64)
        mine[: len(samples)] = torch.from_numpy(samples)
        found = self.gather_blocks(mine).numpy().reshape(self.size, -1, 2)
        return np.concatenate([block[:n] for block, n in zip(found, rows, strict=True)])

    def gather_blocks(self, block: Tensor) -> Tensor:
        """The workers' CPU tensors, of one shape, one after another along the first axis."""
        if self.size == 1:
            return block
        found = [torch.empty_like(block) for _ in range(self.size)]
        with _collective():
            dist.all_gather(found, block, group=self._messages)
        return torch.cat(found)

    def gather(self, value: Any) -> list[Any]:
        """Small plain values of all workers, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(found, value, group=self._messages)
        return found


@contextmanager
def _collective() -> Generator[None]:
    """What fails here is another worker, or the way to it, so that its own error can be told."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(str(error)) from error


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    num_bytes = 0
    for tensor in tensors:
        if buckets[-1] and num_bytes + tensor.nbytes > _BUCKET_BYTES:
            buckets.append([])
            num_bytes = 0
        buckets[-1].append(tensor)
        num_bytes += tensor.nbytes
    return buckets


def shard(module: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Share the weights of `module` out over all workers (FSDP2), layer by layer, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def reshard(module: Any) -> None:
    """Give back what a forward without a backward has gathered at the root of a sharded module.

    FSDP2 keeps the root's weights for the backward; until then they are not the optimiser's.
    """
    module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; then all workers have to ask for it."""
    gathered: Any = getattr(tensor, "full_tensor", None)
    return tensor if gathered is None else gathered()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor where and how (sharded or not) `parameter` is."""
    there = tensor.to(parameter.device)
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None or there.dim() == 0:
        return there
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(parameter, "placements", None)
    return distribute_tensor(there, mesh, placements, src_data_rank=None)
