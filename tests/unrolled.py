"""The gradients of `stillhouse.distillation.adjoint` by autograd through a graph of all steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.distillation.adjoint import Descent, Gradients, Objective


def unrolled(
    descent: Descent, start: Tensor, num_steps: int, objective: Objective, leaves: Sequence[Tensor]
) -> Gradients:
    """The same as `descend` and `adjoint`, by autograd through a graph of all N steps.

    Memory grows with N.
    """
    eta = descent.learning_rate.detach().requires_grad_()
    first = theta = start.detach().requires_grad_()
    velocity = torch.zeros_like(start)
    terms: dict[int, Tensor] = {}
    for step in range(num_steps + 1):
        value = objective(step, theta)
        if value is not None:
            terms[step] = value
        if step < num_steps:
            loss = descent.loss(step, theta)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            velocity = descent.momentum * velocity + gradient
            theta = theta - eta * velocity
    total = torch.stack(list(terms.values())).sum()
    of_eta, of_start, *found = torch.autograd.grad(
        total, [eta, first, *leaves], materialize_grads=True
    )
    detached = {step: value.detach() for step, value in terms.items()}
    return Gradients(detached, tuple(found), of_eta, of_start)
