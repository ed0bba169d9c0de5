"""Cases of the vectors made by running references, from `tests/vectors` or STILLHOUSE_VECTORS."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

VECTORS = Path(os.environ.get("STILLHOUSE_VECTORS", Path(__file__).parent / "vectors"))


def cases(name: str, *keys: str) -> list[Any]:
    """The cases of a file whose inputs have all the keys."""
    found = json.loads((VECTORS / f"kd_{name}.json").read_text())["cases"]
    chosen = [case for case in found if {*keys} <= {*case["inputs"], *case["outputs"]}]
    assert chosen, f"no case of {name} has {keys}"
    return [pytest.param(c["inputs"], c["outputs"], id=c["description"][:60]) for c in chosen]


def double(values: Any, *, learned: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=learned)


def check(
    loss: Callable[[Tensor], Tensor], at: Any, value: Any, gradient: Any, rtol=1e-9, atol=1e-12
) -> None:
    """Value and gradient of a loss in float64."""
    point = double(at, learned=True)
    found = loss(point)
    assert found.item() == pytest.approx(float(value), rel=rtol, abs=atol)
    if gradient is not None:
        (slope,) = torch.autograd.grad(found, point)
        torch.testing.assert_close(slope, double(gradient), rtol=rtol, atol=10 * atol)
