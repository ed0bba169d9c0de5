"""What is kept of next-token distributions: the likeliest tokens and the rest, or drawn tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import InputError


def top_tokens(logits: Tensor, top_k: int, temperatures: Sequence[float]) -> list[Tensor]:
    """The likeliest tokens of logits [n, V], and for each temperature t the log of the others'
    summed p^(1/t): ids int32 [n, k], log-probabilities float16 [n, k], descending, tails float32
    [n, len(temperatures)].

    Raises:
        InputError: a logit is NaN, or a row has no finite one.
    """
    log_probs = _log_probs(logits)
    values, ids = log_probs.topk(top_k, dim=1)
    rest = log_probs.scatter(1, ids, -torch.inf)
    tails = torch.stack([(rest / t).logsumexp(1) for t in temperatures], 1)
    return [ids.int(), values.half(), tails]


def drawn_tokens(logits: Tensor, uniform: Tensor) -> list[Tensor]:
    """Tokens drawn from logits [n, V] by uniform numbers [n, k], in the form of `top_tokens`.

    A token that was drawn c times has log(c / k), places that are left over have -inf.
    """
    cumulative = _log_probs(logits).double().exp().cumsum(1)
    drawn = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=logits.shape[1] - 1).sort(1).values
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = first.cumsum(1) - 1  # of each draw's token among the distinct ones
    counts = torch.zeros_like(cumulative[:, :1]).expand(drawn.shape).clone()
    counts.scatter_add_(1, place, torch.ones_like(counts))
    ids = drawn[:, :1].expand(drawn.shape).clone().scatter_(1, place, drawn)
    counts, order = counts.sort(dim=1, descending=True, stable=True)
    log_probs = (counts / uniform.shape[1]).log()
    tails = torch.full_like(log_probs[:, :1], -torch.inf)
    return [ids.gather(1, order).int(), log_probs.half(), tails.float()]


def _log_probs(logits: Tensor) -> Tensor:
    log_probs = logits.float().log_softmax(1)
    if not bool(log_probs.isfinite().any(1).all()):
        raise InputError("the teacher gives NaN: it is broken, or does not fit its precision")
    return log_probs
