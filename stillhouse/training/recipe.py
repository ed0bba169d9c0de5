"""What `auto` stands for: learning rate and batch from a model's width and its tokens.

    learning rate = 2e-3 sqrt(128 / width), at most 0.5 / width    of a model from scratch
    batch         = 1,024 sqrt(tokens / 1 M) tokens, a power of two sequences, at least 8

Up to a width of 256 and 1 M tokens both are measured (`benchmarks/learning_rate.py`,
docs/measurements.md). Above, they follow published practice: Brown et al. (2020), table 2.1, has
6e-4 at a width of 768 and 1.2e-4 at 4,096, where this gives 6.5e-4 and 1.2e-4; the batch that
training can use grows with about the square root of its tokens (Zhang et al., 2024, "How does
critical batch size scale in pre-training?"), to 0.6 M at 300 B tokens here, against 0.5 M to
3.2 M of GPT-3.

A model that continues from one that this job trained takes the same rate; one that is given takes a
tenth, for it is likely to be larger and to have been trained for longer.
"""

import math
from typing import Literal, TypeVar

from stillhouse.spec import Optimisation

RECIPE_VERSION = 2
"""Runs are named by their spec, which may say `auto`: raise it when the rule changes."""
Start = Literal["fresh", "trained", "given"]
"""From scratch, from a model that this job trained, or from one that it was given."""

_RATE, _AT_WIDTH = 2e-3, 128
_RATE_TIMES_WIDTH = 0.5
_SHARE_OF_RATE: dict[Start, float] = {"fresh": 1.0, "trained": 1.0, "given": 0.1}
_BATCH_TOKENS = 1024
_MIN_BATCH = 8

S = TypeVar("S", bound=Optimisation)


def choose(
    settings: S, *, width: int, num_tokens: float, sequence_length: int, start: Start = "fresh"
) -> S:
    """The settings with numbers where they say `auto`.

    Args:
        settings: of a training.
        width: hidden size of the model.
        num_tokens: that it is trained on.
        sequence_length: of them.
        start: what the training begins with.
    """
    chosen: dict[str, float | int] = {}
    if settings.learning_rate == "auto":
        chosen["learning_rate"] = auto_rate(width, start)
    if settings.global_batch == "auto":
        chosen["global_batch"] = auto_batch(num_tokens, sequence_length)
    return settings.model_copy(update=chosen)


def auto_rate(width: int, start: Start = "fresh") -> float:
    """The peak of the learning rate, to two digits."""
    rate = min(_RATE * math.sqrt(_AT_WIDTH / width), _RATE_TIMES_WIDTH / width)
    return float(f"{rate * _SHARE_OF_RATE[start]:.1e}")


def auto_batch(num_tokens: float, sequence_length: int) -> int:
    """Sequences a step."""
    wanted = _BATCH_TOKENS * math.sqrt(num_tokens / 1e6) / sequence_length
    return max(_MIN_BATCH, 2 ** round(math.log2(max(wanted, 1))))
