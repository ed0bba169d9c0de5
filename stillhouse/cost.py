"""What a selection costs: the paper's accounting, and FLOPs counted from a model's sizes.

The paper's unit is one auxiliary model's forward pass over one token; backward is two forwards.
"""

from dataclasses import dataclass
from typing import Literal

Method = Literal["color_filter", "conditional_only", "rho_down", "rho_down_prior", "random"]

# forward passes over the tau * n candidates that run in parallel, before the target's training
_PARALLEL_PASSES = {
    "color_filter": 2,
    "conditional_only": 1,
    "rho_down": 1,
    "rho_down_prior": 1,
    "random": 0,
}
_WITH_PRIOR = ("color_filter", "conditional_only", "rho_down_prior")
_ONLINE = ("rho_down", "rho_down_prior")  # the learner scores and trains on what it selects


@dataclass(frozen=True, slots=True)
class PaperCost:
    """Auxiliary forward passes, in the unit of the tokens that were given (e.g. billions)."""

    prior: float
    serial: float
    parallel: float
    training: float

    @property
    def total(self) -> float:
        """The sum of all four."""
        return self.prior + self.serial + self.parallel + self.training


def paper_cost(
    method: Method, prior_tokens: float, selected_tokens: float, tau: float, target_ratio: float
) -> PaperCost:
    """Cost of selecting n of tau * n tokens and training the target on them (the paper's table).

    prior 3m; serial tau*n + 2n for RHO; parallel 2*tau*n for CoLoR; training 3nL, where m is
    `prior_tokens`, n `selected_tokens` and L `target_ratio`, the target's forward pass over the
    auxiliary one's. Fine-tuning on the target domain is left out, as in the paper.
    """
    candidates = tau * selected_tokens
    return PaperCost(
        prior=3 * prior_tokens if method in _WITH_PRIOR else 0,
        serial=candidates + 2 * selected_tokens if method in _ONLINE else 0,
        parallel=_PARALLEL_PASSES[method] * candidates,
        training=3 * selected_tokens * target_ratio,
    )


def forward_flops(
    *,
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    vocab_size: int,
    sequence_length: int,
    num_heads: int,
    num_kv_heads: int,
    gated_mlp: bool = True,
) -> int:
    """FLOPs of a decoder's forward pass for one token; training on a token takes three times that.

    2 * (matmul parameters) + causal attention. With width H, kv width K = H * kv_heads / heads,
    MLP width I and sequence length T, a layer has 2H^2 + 2HK + (3 if gated else 2) * H * I
    parameters and its attention 4 * H * (T / 2) FLOPs a token (scores and values, T / 2 keys on
    average); the output layer has H * V. Embedding look-up, norms and softmax are left out.
    """
    kv_width = hidden_size // num_heads * num_kv_heads
    mlp = (3 if gated_mlp else 2) * hidden_size * intermediate_size
    layer = 2 * hidden_size**2 + 2 * hidden_size * kv_width + mlp
    attention = 2 * hidden_size * sequence_length
    return num_layers * (2 * layer + attention) + 2 * hidden_size * vocab_size
