"""Exact gradients through a training run at the memory of one of its steps.

A run of N steps of gradient descent with momentum mu and step size eta,

    g_n = d loss_n(theta_n; z) / d theta,   v_{n+1} = mu v_n + g_n,
    theta_{n+1} = theta_n - eta v_{n+1},    v_0 = 0,

ends in an objective J = sum_n J_n(theta_n). z are any tensors that the step losses read: images,
label logits, weights of samples. Reverse recursion (n = N-1, ..., 0; lam and w start as dJ_N):

    dJ/dz   -= eta d(g_n . w)/dz            dJ/deta -= g_n . w
    lam     <- lam - eta d(g_n . w)/dtheta + dJ_n/dtheta
    w       <- lam + mu w

d(g_n . w)/dtheta is a Hessian-vector product: one graph, of one step, is alive at a time, and of
the rest only theta_0..theta_N are kept. A backward step costs the forward step once more and its
double backward. The recursion is Pontryagin's adjoint equation, which PDS uses for language data
(Gu et al. 2024); w = lam where mu = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

StepLoss = Callable[[int, Tensor], Tensor]  # n and theta_n [P] -> scalar
Objective = Callable[[int, Tensor], Tensor | None]  # n and theta_n [P] -> J_n, None for no term
Visit = Callable[[int, Tensor, Tensor], None]  # n, theta_n [P] and w [P] of the step from n


def alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class Descent:
    """Gradient descent with momentum on step losses.

    Attributes:
        loss: of step n at theta_n; deterministic, since it is evaluated twice.
        learning_rate: eta, a scalar tensor.
        momentum: mu (heavy ball).
        all_reduce: sums a tensor over the workers, when `loss` is one worker's share of the
            step's loss. All workers then hold the same states; gradients of leaves stay local.
    """

    loss: StepLoss
    learning_rate: Tensor
    momentum: float = 0.0
    all_reduce: Callable[[Tensor], Tensor] = alone


@dataclass(frozen=True, slots=True)
class Run:
    """`states` theta_0..theta_N, each [P], and `losses` [N] before each step (local shares)."""

    states: tuple[Tensor, ...]
    losses: Tensor


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of J by each leaf, by eta and by theta_0; `terms` maps n to the value of J_n."""

    terms: dict[int, Tensor]
    leaves: tuple[Tensor, ...]
    learning_rate: Tensor
    start: Tensor

    @property
    def objective(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


def descend(descent: Descent, start: Tensor, num_steps: int) -> Run:
    """Run `num_steps` from theta_0 = `start` [P]; no graph is kept between steps."""
    eta = descent.learning_rate.detach()
    theta, velocity = start.detach(), torch.zeros_like(start)
    states, losses = [theta], list[Tensor]()
    for step in range(num_steps):
        point = theta.detach().requires_grad_()
        loss = descent.loss(step, point)
        (gradient,) = torch.autograd.grad(loss, point)
        velocity = descent.momentum * velocity + descent.all_reduce(gradient)
        theta = theta - eta * velocity
        states.append(theta)
        losses.append(loss.detach())
    return Run(tuple(states), torch.stack(losses))


def adjoint(
    descent: Descent,
    states: Sequence[Tensor],
    objective: Objective,
    leaves: Sequence[Tensor],
    *,
    first_order: bool = False,
    visit: Visit | None = None,
) -> Gradients:
    """The gradients of J along the run through `states` (theta_0..theta_N).

    Args:
        descent: as for `descend`.
        states: of the run.
        objective: J_n by n; it must have a term at N.
        leaves: tensors z that require gradients and that `descent.loss` reads.
        first_order: leave out the Hessian-vector products (TESLA); approximate for N > 1.
        visit: called at every backward step, before w is updated.
    """
    eta = descent.learning_rate.detach()
    num_steps = len(states) - 1
    terms: dict[int, Tensor] = {}
    costate = weight = _term_gradient(objective, num_steps, states[-1], terms)
    by_leaf = [torch.zeros_like(leaf) for leaf in leaves]
    eta_gradient = torch.zeros_like(eta)
    for step in reversed(range(num_steps)):
        if visit is not None:
            visit(step, states[step], weight)
        slope, hessian_product, parts = _pull_back(descent, step, states[step], weight, leaves)
        eta_gradient -= slope
        for total, part in zip(by_leaf, parts, strict=True):
            total -= eta * part
        costate = costate + _term_gradient(objective, step, states[step], terms)
        if not first_order:
            costate = costate - eta * descent.all_reduce(hessian_product)
        weight = costate + descent.momentum * weight
    return Gradients(terms, tuple(by_leaf), descent.all_reduce(eta_gradient), costate)


def _term_gradient(
    objective: Objective, step: int, theta: Tensor, terms: dict[int, Tensor]
) -> Tensor:
    """dJ_n/dtheta [P], zero without a term; records the term's value in `terms`."""
    point = theta.detach().requires_grad_()
    value = objective(step, point)
    if value is None:
        return torch.zeros_like(theta)
    terms[step] = value.detach()
    return torch.autograd.grad(value, point)[0]


def _pull_back(
    descent: Descent, step: int, theta: Tensor, weight: Tensor, leaves: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """g . w and its derivatives by theta and by each leaf; the graph is freed on return."""
    point = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(descent.loss(step, point), point, create_graph=True)
    hessian_product, *by_leaf = torch.autograd.grad(
        gradient, [point, *leaves], grad_outputs=weight, materialize_grads=True
    )
    return gradient.detach() @ weight, hessian_product, by_leaf


class FlatModule:
    """A module as a pure function of one vector theta [P] of its parameters.

    Parameters are flattened in the order of `module.named_parameters()`, shared ones once. Buffers
    are copied for every call. The module must not be random (dropout); it is not thread-safe.
    """

    def __init__(self, module: nn.Module) -> None:
        named = dict(module.named_parameters())
        self.names = tuple(named)
        self.shapes = tuple(tuple(parameter.shape) for parameter in named.values())
        self._sizes = [prod(shape) for shape in self.shapes]
        self._module = module

    @property
    def num_parameters(self) -> int:
        return sum(self._sizes)

    def __call__(self, theta: Tensor, *inputs: Any, **options: Any) -> Any:
        values: dict[str, Tensor] = dict(zip(self.names, self.unflatten(theta), strict=True))
        values |= {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        return functional_call(self._module, values, inputs, options)

    def unflatten(self, theta: Tensor) -> list[Tensor]:
        """Views of theta [P], one for each parameter."""
        parts = theta.split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def parameters(self) -> Tensor:
        """A copy of the module's current parameters [P]."""
        return torch.cat([tensor.detach().flatten() for tensor in self._module.parameters()])
