"""How fast this machine trains and scores a model: a probe of a second or two."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from stillhouse.models.shape import planned_shape
from stillhouse.spec import ComputeSettings, Dtype, ModelSettings, Optimisation

_PROBE_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one worker, and the FLOPs of a forward pass a token."""

    scoring: float
    training: float
    flops_per_token: float


def probe(
    model: ModelSettings,
    vocab_size: int,
    sequence_length: int,
    settings: Optimisation,
    compute: ComputeSettings,
    scoring_dtype: Dtype = "auto",
) -> Speed:
    """Score a few sequences and train two steps on random tokens."""
    from stillhouse.models.causal_lm import build_model, choose_device, choose_dtype
    from stillhouse.models.scoring import ScoringModel
    from stillhouse.training.batches import TokenBatches
    from stillhouse.training.loop import train

    device = choose_device(compute.device, 0)
    built = build_model(
        model, vocab_size=vocab_size, sequence_length=sequence_length, seed=0, eos_id=0
    )
    built.to(device)  # pyright: ignore[reportArgumentType]
    rows = max(2, _PROBE_TOKENS // sequence_length)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (rows, sequence_length), dtype=np.int64)
    scorer = ScoringModel(built, dtype=choose_dtype(scoring_dtype, device))
    scorer.token_nll(ids)
    started = perf_counter()
    scorer.token_nll(ids)
    scoring = ids.size / (perf_counter() - started)
    batch = settings.global_batch
    started = perf_counter()
    train(built, TokenBatches(ids, batch_size=batch, seed=0), settings, device=device, num_steps=2)
    training = 2 * batch * sequence_length / (perf_counter() - started)
    flops = planned_shape(model, vocab_size, sequence_length).flops_per_token(sequence_length)
    return Speed(scoring, training, float(flops))
