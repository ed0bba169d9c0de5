"""Where training batches come from: a small protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSources:
    """Whose the tokens of a batch are: `codes` int32 [B, T] are indices into `names`."""

    codes: NDArray[np.int32]
    names: tuple[str, ...]

    def present(self) -> list[str]:
        """The sources that own a token, sorted."""
        return sorted(self.names[i] for i in np.unique(self.codes))


@dataclass(frozen=True, slots=True)
class Batch:
    """One global batch, or a worker's share of it.

    Attributes:
        input_ids: int64 [B, T], on the CPU.
        samples: int64 [B, 2], part and row of each sequence.
        sources: of every token, where they are known.
        signals: by name, what an objective asks for beside the tokens: [B, T] or [B].
    """

    input_ids: Tensor
    samples: NDArray[np.int64]
    sources: TokenSources | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class BatchSource(Protocol):
    """An endless, ordered stream of global batches (a worker's rows of them) that can be
    continued anywhere.
    """

    def next_batch(self) -> Batch:
        """The next batch; always of the same shape."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...
