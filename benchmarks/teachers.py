"""Do the losses of teachers and weak supervision behave as their papers say? Small experiments.

    python benchmarks/teachers.py --json OUT.jsonl [--stage bags information sampling unlabelled]
    python benchmarks/teachers.py --json OUT.jsonl --stage distil --data DATA --store STORE
    python benchmarks/teachers.py --json OUT.jsonl --stage lsskd weak_to_strong --data FASHION

One line of JSON for each cell; running again does what is missing. Stages:

* bags: linear regression from the means of bags (aggregate responses). Excess risk by bag size k
  and rho: it explodes where there are as many bags as features; at low noise some rho is best.
* information: MI-alpha of correlated Gaussian pairs, whose mutual information is known.
* sampling: the gradient of distillation from `k` of a teacher's tokens against that from all 2,048:
  how far it is off, and how far its mean over 400 draws, relative to the exact gradient's length.
* unlabelled: a Gaussian mixture in 200 dimensions from 10 labels and unlabelled data (RSS).
* distil: a language model of 1 M parameters on books, with a teacher of 5 M, and without one at
  equal tokens and at equal FLOPs.
* selected: the same student on a selection or on random data, with the teacher and without.
* wellread: pre-trained, distilled and fine-tuned, or some of these, at equal tokens; fine-tuned on
  books. snli: on the answers of SNLI instead.
* autodistil: do relation losses in a super-network rank its sub-networks?

The last five train with `job: train` on DATA (`teacher_models.py`), three seeds each; `--small`
trains one seed on a hundredth, to find mistakes.

* lsskd: a ConvNet on 1,000 or 2,000 labels of Fashion-MNIST, by labels alone or with branches.
  FASHION is the folder of its four IDX files.
* weak_to_strong: a probe on features that know the other classes tells T-shirts from shirts, taught
  by a small network with 60 labels. PGR: the share of the gap to the ceiling that is closed.

Of these two `--small` does one small cell.

At the end a table of each stage.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from teacher_models import (
    Bench,
    autodistil_cell,
    distil_cell,
    ray_session,
    selected_cell,
    snli_cell,
    wellread_cell,
)
from teachers_fashion import lsskd_cell, weak_to_strong_cell
from torch import nn

from stillhouse.models.token_samples import drawn_tokens, top_tokens
from stillhouse.training.objectives.aggregate import squared
from stillhouse.training.objectives.distil import TopTokens, distillation_loss
from stillhouse.training.objectives.layer_losses import mi_alpha
from stillhouse.training.objectives.robust import linear_objective

Cell = tuple[str, dict[str, Any]]
"""Its stage and its settings."""

RHOS = (0.0, 0.05, 0.1, 0.3, 1.0)
BAGS = [
    *((400, 100, 0.5, k) for k in (1, 2, 3, 4, 5)),
    *((1000, 100, 0.5, k) for k in (2, 5)),
    *((1000, 100, 2.0, k) for k in (2, 5)),
]
"""Samples, features, noise, bag size."""


def bags_cell(samples: int, features: int, noise: float, k: int, rho: float) -> dict[str, float]:
    """Mean excess risk |theta_hat - theta|^2 over 12 seeds, and its standard error."""
    risks = [_bag_risk(seed, samples, features, noise, k, rho) for seed in range(12)]
    return {"risk": float(np.mean(risks)), "error": float(np.std(risks, ddof=1) / 12**0.5)}


def _bag_risk(seed: int, samples: int, features: int, noise: float, k: int, rho: float) -> float:
    generator = np.random.default_rng(seed)
    theta = generator.standard_normal(features) / features**0.5
    num_bags = samples // k
    x = generator.standard_normal((num_bags, k, features))
    means = (x @ theta + noise * generator.standard_normal((num_bags, k))).mean(1)
    # The loss is a quadratic of theta: its minimum solves H theta = -g, with both from autograd.
    inputs, targets = torch.from_numpy(x), torch.from_numpy(means)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return squared(inputs @ value, targets, rho)

    zero = torch.zeros(features, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, zero)
    curvature = torch.autograd.functional.hessian(loss, zero)
    found = torch.linalg.lstsq(curvature, -slope, driver="gelsd").solution  # pyright: ignore
    return float(np.square(found.numpy() - theta).sum())


RHO_TRUE = (0.5, 0.9, 0.97)
ALPHAS = (0.0, 0.5, 0.9, 1.0)
_DIMENSIONS, _BATCH, _STEPS, _LAST = 4, 64, 1500, 300


def information_cell(correlation: float, alpha: float) -> dict[str, float]:
    """The bound in nats, mean and standard deviation of the last 300 batches, and the truth."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def network(outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(_DIMENSIONS, 64), nn.ReLU(), nn.Linear(64, outputs))

    student, teacher, baseline = network(32), network(32), network(1)
    parameters = [p for net in (student, teacher, baseline) for p in net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    logit = math.log(alpha / (1 - alpha)) if 0 < alpha < 1 else (1e4 if alpha else -1e4)
    values: list[float] = []
    for _ in range(_STEPS):
        x, noise = (torch.randn(_BATCH, _DIMENSIONS, generator=generator) for _ in range(2))
        y = correlation * x + (1 - correlation**2) ** 0.5 * noise
        bound = mi_alpha(student(x) @ teacher(y).T, baseline(x)[:, 0], logit)
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        values.append(bound.item())
    truth = -_DIMENSIONS / 2 * math.log(1 - correlation**2)
    last = np.array(values[-_LAST:])
    return {"bound": float(last.mean()), "std": float(last.std()), "truth": truth}


KEPT = (8, 32, 128)
_POSITIONS, _VOCABULARY, _DRAWS = 64, 2048, 400


def sampling_cell(sampling: str, k: int, spread: float) -> dict[str, float]:
    """Relative `bias` and root-mean-square `error` of the gradient of KL by the student's logits.

    Args:
        sampling: what is kept: the `top` tokens and their tail, or `importance`, drawn ones.
        k: how many.
        spread: of the teacher's Gaussian logits; the student's are half noise.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_POSITIONS, _VOCABULARY)
    teacher = spread * torch.randn(shape, generator=generator)
    noise = spread * torch.randn(shape, generator=generator)
    student = ((teacher + noise) / 2).requires_grad_()
    exact = (student.softmax(1) - teacher.softmax(1)).detach()
    total, squares = torch.zeros(shape), 0.0
    draws = _DRAWS if sampling == "importance" else 1
    for _ in range(draws):
        if sampling == "importance":
            made = drawn_tokens(teacher, torch.rand(_POSITIONS, k, generator=generator))
        else:
            made = top_tokens(teacher, k, (1.0,))
        kept = TopTokens(made[0].long(), made[1], made[2][:, 0])
        (slope,) = torch.autograd.grad(distillation_loss(student, kept).sum(), student)
        total += slope / draws
        squares += float((slope - exact).square().sum()) / draws
    length = float(exact.norm())
    return {"bias": float((total - exact).norm()) / length, "error": squares**0.5 / length}


UNLABELLED = [
    (10, 1000, 0.0, 1.0),
    (10, 10000, 0.0, 1.0),
    (10, 10000, 0.5, 1.0),
    (20, 2000, 0.0, 5.0),
    (40, 4000, 0.0, 5.0),
    (40, 10000, 0.5, 5.0),
]
"""Labelled and unlabelled samples, shift of the unlabelled, lambda."""


def unlabelled_cell(labelled: int, others: int, shift: float, weight: float) -> dict[str, float]:
    """Mean accuracy over three seeds of the labelled start and of RSS."""
    found = np.array([_rss(seed, labelled, others, shift, weight) for seed in range(3)])
    start, after = found.mean(0)
    return {"start": float(start), "rss": float(after), "std": float(found[:, 1].std(ddof=1))}


def _rss(seed: int, m: int, n: int, shift: float, weight: float) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    dimensions = 200

    def unit() -> NDArray[np.float64]:
        vector = generator.standard_normal(dimensions)
        return vector / np.linalg.norm(vector)

    mean = unit()
    moved = mean + shift * unit()
    y, signs = generator.choice([-1.0, 1.0], m), generator.choice([-1.0, 1.0], n)
    x = y[:, None] * mean + generator.standard_normal((m, dimensions))
    other = torch.from_numpy(signs[:, None] * moved + generator.standard_normal((n, dimensions)))
    labelled = torch.from_numpy(x), torch.from_numpy(y)
    start = (x * y[:, None]).mean(0)
    theta = torch.from_numpy(start / np.linalg.norm(start))
    velocity = torch.zeros_like(theta)
    steps, rate = 400, 0.3
    for step in range(steps):
        theta.requires_grad_()
        loss = linear_objective(theta, labelled, other, (0.5, 0.5), weight)
        (slope,) = torch.autograd.grad(loss, theta)
        velocity = 0.9 * velocity - rate * (1 - step / steps) * slope
        theta = theta.detach() + velocity
        theta = theta / theta.norm()

    def accuracy(direction: NDArray[np.float64]) -> float:
        """Of a direction on the labelled distribution: Phi(mean . direction / |direction|)."""
        value = mean @ direction / np.linalg.norm(direction)
        return 0.5 * (1 + math.erf(value / 2**0.5))

    return accuracy(start), accuracy(theta.numpy())


STAGES: dict[str, tuple[Callable[..., dict[str, float]], list[dict[str, Any]]]] = {
    "bags": (
        bags_cell,
        [
            {"samples": n, "features": d, "noise": s, "k": k, "rho": rho}
            for n, d, s, k in BAGS
            for rho in RHOS
        ],
    ),
    "information": (
        information_cell,
        [{"correlation": r, "alpha": a} for r in RHO_TRUE for a in ALPHAS],
    ),
    "sampling": (
        sampling_cell,
        [
            {"sampling": how, "k": k, "spread": spread}
            for spread in (2.0, 4.0)
            for how in ("top", "importance")
            for k in KEPT
        ],
    ),
    "unlabelled": (
        unlabelled_cell,
        [{"labelled": m, "others": n, "shift": s, "weight": w} for m, n, s, w in UNLABELLED],
    ),
}
SEEDS = (0, 1, 2)
OF_MODELS: dict[str, tuple[Callable[..., dict[str, float]], list[dict[str, Any]]]] = {
    "distil": (
        distil_cell,
        [{"seed": seed, "arm": arm} for seed in SEEDS for arm in ("distil", "ce", "flops")],
    ),
    "selected": (
        selected_cell,
        [
            {"seed": seed, "arm": data + teacher}
            for seed in SEEDS
            for data in ("random", "selected")
            for teacher in ("", "+distil")
        ],
    ),
    "wellread": (
        wellread_cell,
        [{"seed": seed, "arm": arm} for seed in SEEDS for arm in ("pd", "pf", "d", "s")],
    ),
    "snli": (
        snli_cell,
        [{"seed": seed, "arm": arm} for seed in SEEDS for arm in ("pd", "pf", "d", "s")],
    ),
    "autodistil": (autodistil_cell, [{"seed": seed} for seed in SEEDS]),
}

OF_IMAGES: dict[str, tuple[Callable[..., dict[str, float]], list[dict[str, Any]]]] = {
    "lsskd": (
        lsskd_cell,
        [
            {"labels": n, "objective": name, "epochs": 20, "seed": seed}
            for n in (1000, 2000)
            for name in ("cross_entropy", "lsskd")
            for seed in SEEDS
        ],
    ),
    "weak_to_strong": (
        weak_to_strong_cell,
        [
            {"known": 60, "others": 4000, "pretrained": 10000, "epochs": 10, "seed": seed}
            for seed in range(8)
        ],
    ),
}
SMALL: dict[str, dict[str, Any]] = {
    "lsskd": {"labels": 300, "objective": "lsskd", "epochs": 1, "seed": 0},
    "weak_to_strong": {"known": 60, "others": 400, "pretrained": 400, "epochs": 1, "seed": 0},
}
"""One cell of each stage on Fashion-MNIST."""


def missing(stages: list[str], done: list[dict[str, Any]], *, small: bool) -> Iterator[Cell]:
    """The cells of some stages that have no line yet."""
    there = [(line["stage"], line["settings"]) for line in done]
    for stage in stages:
        cells = (STAGES | OF_MODELS | OF_IMAGES)[stage][1]
        if small and stage in SMALL:
            cells = [SMALL[stage]]
        yield from ((stage, s) for s in cells if (stage, s) not in there)


def main() -> None:
    """Do what is missing, and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--stage", nargs="*", choices=[*STAGES, *OF_MODELS, *OF_IMAGES], default=[*STAGES]
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    if {*chosen.stage} & {*OF_MODELS} and not (chosen.data and chosen.store):
        parser.error("stages with language models need --data and --store")
    if {*chosen.stage} & {*OF_IMAGES} and not chosen.data:
        parser.error("stages on Fashion-MNIST need --data, the folder of its IDX files")
    bench = Bench(chosen.data, chosen.store, chosen.small)
    functions = {name: function for name, (function, _) in STAGES.items()}
    functions |= {name: partial(function, bench) for name, (function, _) in OF_MODELS.items()}
    functions |= {n: partial(function, chosen.data) for n, (function, _) in OF_IMAGES.items()}
    torch.set_num_threads(1)
    lines = chosen.json.read_text().splitlines() if chosen.json.exists() else []
    done = [json.loads(line) for line in lines]
    with ray_session(chosen.store) if chosen.store else nullcontext():
        for stage, settings in missing(chosen.stage, done, small=chosen.small):
            if chosen.small and settings.get("seed"):
                continue
            started = perf_counter()
            found = functions[stage](**settings)
            line = {"stage": stage, "settings": settings, **found}
            line["seconds"] = perf_counter() - started
            done.append(line)
            with chosen.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
    for line in done:
        if line["stage"] in chosen.stage:
            numbers = {k: v for k, v in line.items() if isinstance(v, float)}
            said = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
            print(line["stage"], *(f"{k}={v}" for k, v in line["settings"].items()), "->", said)


if __name__ == "__main__":
    main()
