"""PDS: what each sequence's weight in training does to a target's loss (Gu et al. 2024).

A model trains on weighted sequences, theta_{t+1} = theta_t - eta d/dtheta sum_n gamma_n l(x_n), and
J = sum_{t=1..T} l_target(theta_t) is to become small. With the adjoint's

    lam_t = d l_target(theta_t) + lam_{t+1} - eta H_t lam_{t+1},   lam_T = d l_target(theta_T),

the score of a sequence is -dJ/dgamma_n = sum_t eta d l(x_n, theta_t) . lam_{t+1}: positive where
more of it in training lowers the target's loss. The products are exact for the sequences of the
run itself; for any other, they say what a first bit of it in every step would do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.distillation.adjoint import Descent, Run, adjoint, descend
from stillhouse.errors import DivergedError

SequenceLosses = Callable[[Tensor, Tensor], Tensor]  # theta [P], input_ids [B, T] -> NLL [B]


@dataclass(frozen=True, slots=True)
class PdsRun:
    """The small training whose steps weigh the sequences.

    Attributes:
        losses: mean NLL of every sequence; differentiable twice (eager attention).
        batches: input_ids [B, T] of each step; every sequence has weight 1/B.
        target: input_ids of the target's sequences [D, T].
        learning_rate: eta.
    """

    losses: SequenceLosses
    batches: Sequence[Tensor]
    target: Tensor
    learning_rate: float

    def objective(self, step: int, theta: Tensor) -> Tensor | None:
        """The target's mean loss at theta_t, from t = 1 on."""
        return self.losses(theta, self.target).mean() if step else None

    def descent(self, weights: Sequence[Tensor], like: Tensor) -> Descent:
        """The weighted training, as the adjoint takes it; weights [B] by step."""

        def loss(step: int, theta: Tensor) -> Tensor:
            return (weights[step] * self.losses(theta, self.batches[step])).sum()

        return Descent(loss, torch.tensor(self.learning_rate).to(like))


def uniform_weights(run: PdsRun, like: Tensor) -> list[Tensor]:
    """1/B for every sequence of every step."""
    return [torch.full((len(batch),), 1 / len(batch)).to(like) for batch in run.batches]


def train_for_scores(run: PdsRun, start: Tensor) -> Run:
    """Train from theta_0 = `start` [P] with uniform weights; keeps all T+1 states.

    Raises:
        DivergedError: a loss is NaN or infinite.
    """
    made = descend(run.descent(uniform_weights(run, start), start), start, len(run.batches))
    if not torch.isfinite(made.losses).all():
        raise DivergedError(
            f"the proxy's loss is not finite after {int(torch.isfinite(made.losses).sum())} of "
            f"{len(run.batches)} steps at learning rate {run.learning_rate:g}: lower it"
        )
    return made


def weight_gradients(run: PdsRun, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """dJ/dweights [B] of the sequences of each step's batch, exactly."""
    weights = [weight.requires_grad_() for weight in uniform_weights(run, states[0])]
    return adjoint(run.descent(weights, states[0]), states, run.objective, weights).leaves


def pds_scores(
    run: PdsRun, states: Sequence[Tensor], sequences: Sequence[Tensor], *, every: int = 1
) -> Tensor:
    """Scores of sequences given in batches of input_ids [b, T], in order: [sum of b].

    Args:
        run: the training.
        states: theta_0..theta_T of it.
        sequences: what to score; one pass of two forwards' cost for each step that counts.
        every: only steps t divisible by it count (the paper: 10); the sum is scaled up by it.
    """
    totals = [torch.zeros(len(batch)).to(states[0]) for batch in sequences]

    def visit(step: int, theta: Tensor, weight: Tensor) -> None:
        if step % every == 0:
            for total, batch in zip(totals, sequences, strict=True):
                total += (every * run.learning_rate) * directional(run.losses, theta, weight, batch)

    descent = run.descent(uniform_weights(run, states[0]), states[0])
    adjoint(descent, states, run.objective, [], visit=visit)
    return torch.cat(totals)


def directional(
    losses: SequenceLosses, theta: Tensor, direction: Tensor, input_ids: Tensor
) -> Tensor:
    """d l(x_n, theta) . direction for every sequence [B], by forward differentiation."""
    return torch.func.jvp(lambda point: losses(point, input_ids), (theta,), (direction,))[1]
