import pytest
import torch

from stillhouse.spec import Optimisation
from stillhouse.training.optimisation import learning_rate, make_optimizer


def rates(num_steps: int, **settings: object) -> list[float]:
    chosen = Optimisation.model_validate({"learning_rate": 1.0, **settings})
    return [round(learning_rate(step, num_steps, chosen), 4) for step in range(num_steps)]


def test_cosine_warms_up_and_ends_at_the_final_rate() -> None:
    assert rates(8, warmup=0.25) == [0.5, 1.0, 0.9397, 0.775, 0.55, 0.325, 0.1603, 0.1]


def test_wsd_is_flat_then_a_line() -> None:
    expected = [1.0] * 8 + [0.55, 0.1]
    assert rates(10, schedule="wsd", warmup=0.1) == expected
    assert rates(10, schedule="wsd", warmup=0.2)[:3] == [0.5, 1.0, 1.0]


def test_constant_keeps_the_peak() -> None:
    assert rates(4, schedule="constant", warmup=0.5) == [0.5, 1.0, 1.0, 1.0]


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
