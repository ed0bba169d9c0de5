"""The rule behind `auto`, by values worked out by hand, and against published recipes."""

import pytest

from stillhouse.spec import Optimisation
from stillhouse.training.recipe import auto_batch, auto_rate, choose


@pytest.mark.parametrize(
    ("width", "rate"),
    [(32, 4e-3), (64, 2.8e-3), (128, 2e-3), (256, 1.4e-3), (1024, 4.9e-4)],
)
def test_rate_falls_with_the_root_of_the_width_and_then_with_the_width(width, rate):
    assert auto_rate(width) == rate


def test_rate_of_a_model_that_is_tuned():
    assert auto_rate(128, "trained") == 2e-3
    assert auto_rate(128, "given") == 2e-4
    assert auto_rate(4096, "given") == 1.2e-5


@pytest.mark.parametrize(
    ("num_tokens", "length", "batch"),
    [
        (1e6, 128, 8),  # 1,024 tokens
        (4e6, 128, 16),  # twice as many
        (1e4, 128, 8),  # never fewer
        (1e8, 128, 64),  # 10,240 tokens are 80 sequences: 64 is nearer than 128, in ratio
        (3e11, 2048, 256),  # 561 k tokens are 274 sequences
    ],
)
def test_batch_grows_with_the_root_of_the_tokens(num_tokens, length, batch):
    assert auto_batch(num_tokens, length) == batch


@pytest.mark.parametrize(
    ("width", "published"), [(768, 6e-4), (1536, 2.5e-4), (2048, 2e-4), (4096, 1.2e-4)]
)
def test_rate_of_large_models_is_near_gpt_3s(width, published):
    """Brown et al. (2020), table 2.1: within a third."""
    assert published / 1.34 < auto_rate(width) < published * 1.34


def test_only_what_is_left_to_it_is_chosen():
    asked = Optimisation(learning_rate=1e-3, warmup=0.5)
    chosen = choose(asked, width=128, num_tokens=4e6, sequence_length=128)
    assert (chosen.peak_rate, chosen.batch_size, chosen.warmup) == (1e-3, 16, 0.5)
    asked = Optimisation(global_batch=3)
    chosen = choose(asked, width=128, num_tokens=4e6, sequence_length=128, start="trained")
    assert (chosen.peak_rate, chosen.batch_size) == (2e-3, 3)
