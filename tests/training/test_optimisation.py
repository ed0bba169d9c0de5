import math

import pytest
import torch

from stillhouse.spec import Optimisation
from stillhouse.training.optimisation import LossGuard, late_fall, learning_rate, make_optimizer


def rates(num_steps: int, **settings: object) -> list[float]:
    chosen = Optimisation.model_validate({"learning_rate": 1.0, **settings})
    return [round(learning_rate(step, num_steps, chosen), 4) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"warmup": 0.25}, [0.5, 1.0, 0.9397, 0.775, 0.55, 0.325, 0.1603, 0.1]),
        ({"schedule": "wsd", "warmup": 0.1}, [1.0] * 8 + [0.55, 0.1]),
        ({"schedule": "wsd", "warmup": 0.2}, [0.5] + [1.0] * 7 + [0.55, 0.1]),
        ({"schedule": "constant", "warmup": 0.5}, [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(settings: dict, expected: list[float]) -> None:
    assert rates(len(expected), **settings) == expected


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_extreme_warm_ups(schedule: str, warmup: float) -> None:
    for num_steps in (1, 2, 3):
        found = rates(num_steps, schedule=schedule, warmup=warmup)
        assert all(0.0 < rate <= 1.0 for rate in found)


def test_weight_decay_is_for_matrices() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, Optimisation(learning_rate=1e-3, weight_decay=0.1, eps=1e-15))
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["params"][0] is model.weight and vectors["params"][0] is model.bias
    assert matrices["eps"] == 1e-15 and matrices["betas"] == (0.9, 0.95)


def test_a_jump_is_an_explosion_and_noise_is_not() -> None:
    guard = LossGuard()
    losses = [10 - i / 10 + (i % 3) for i in range(60)]
    assert not any(guard.exploded(loss) for loss in losses)
    mean = guard.mean
    assert mean == pytest.approx(8.00074, abs=1e-5)
    assert guard.exploded(mean + 3.1)
    assert guard.mean == mean  # not included
    restored = LossGuard()
    restored.load_state_dict(guard.state_dict())
    assert not guard.exploded(mean + 2.9) and not restored.exploded(mean + 2.9)
    assert restored.state_dict() == guard.state_dict() != {"mean": mean, "steps": 60}


def test_a_wild_start_is_allowed_but_nan_is_not() -> None:
    guard = LossGuard()
    assert not guard.exploded(1.0)
    assert not guard.exploded(12.0)
    assert guard.mean == 6.5
    assert guard.exploded(math.nan) and guard.exploded(math.inf)


def test_late_fall_is_the_last_tenth_against_the_one_before() -> None:
    losses = [9.0] * 32 + [5.0, 5.1, 4.9, 5.0] + [4.8, 4.7, 4.9, 4.8]  # means 5.0 and 4.8
    assert late_fall(losses) == pytest.approx(0.2)
    assert late_fall(losses[::-1]) == 0.0  # it rose
    # means 5.0 and 4.9; variances 1/3 each over 4: a standard error of sqrt(1/6) = 0.41
    assert late_fall([9.0] * 32 + [4.5, 5.5, 4.5, 5.5] + [4.4, 5.4, 4.4, 5.4]) == 0.0
    assert late_fall([9.0] * 17 + [5.0, 4.0]) is None  # too few
