"""The cost of a selection by the accounting of the paper.

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
