"""CoLoR-Filter's score: how much a sequence's loss drops when the prior is tuned on the target.

    color(x) = S_prior(x) - S_conditional(x)
    S_m(x)   = mean over t = 1..T-1 of -log p_m(x_t | x_<t)

(Brandfonbrener et al. 2024, section 3; the paper writes the negative and takes the smallest.) Every
position counts, EOS included; the first token is not predicted. Losses are in nats, float32.
"""

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the functions need only the tensors' own methods
    from torch import Tensor

Losses = TypeVar("Losses", "Tensor", NDArray[np.float32])


class TokenLosses(Protocol):
    """A language model to score with."""

    def token_nll(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """NLL in nats of every predicted token: integers [N, T] -> float32 [N, T-1]."""
        ...


def token_nll(logits: "Tensor", input_ids: "Tensor") -> "Tensor":
    """NLL of every predicted token: logits [B, T, V], input_ids [B, T] -> float32 [B, T-1].

    Column t-1 holds the loss of position t. Makes one float32 copy of the logits.
    """
    log_probs = logits[:, :-1].float().log_softmax(-1)
    return -log_probs.gather(-1, input_ids[:, 1:, None].long()).squeeze(-1)


def color_score(prior_nll: Losses, conditional_nll: Losses) -> Losses:
    """`prior - conditional`, larger is better; arrays or tensors of one shape, float32."""
    return prior_nll - conditional_nll


def piece_sums(
    token_nll: NDArray[np.float32],
    row: NDArray[np.integer],
    start: NDArray[np.integer],
    end: NDArray[np.integer],
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """NLL sum and token count of P pieces of documents: token_nll [B, T-1], the rest [P].

    A piece that owns positions [start, end) of sequence `row` owns the predicted tokens at
    positions max(start, 1) to end-1. Sums are taken in float64; a piece of no tokens has sum 0.
    """
    num_columns = token_nll.shape[1]
    first = row.astype(np.int64) * num_columns + np.maximum(start, 1) - 1
    tokens = end.astype(np.int64) - np.maximum(start, 1)
    bounds = np.stack([first, first + tokens], axis=1).ravel()
    padded = np.append(token_nll.ravel(), np.float32(0))  # the last bound may be one past the end
    sums = np.add.reduceat(padded, bounds, dtype=np.float64)[::2] if len(bounds) else np.zeros(0)
    return np.where(tokens > 0, sums, 0).astype(np.float32), tokens.astype(np.int32)
