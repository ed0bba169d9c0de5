"""The scoring kernel against a plain loop, side by side in one process: speed and exactness.

    python benchmarks/kernel.py [--json] [--hidden 128] [--length 128] [--vocab 4096] [--compile]

(a) is what one writes first: `model(input_ids).logits` in float32 and a cross-entropy, 32
sequences at a time, with PyTorch's and transformers' defaults. Every other row is the kernel. All
use one thread and random tokens on a randomly initialised model with its output made peaky, so
that losses are spread as a trained model's. Rows are timed in turns; a row's time is its best
in CPU seconds (one thread), `first_s` its first round by the clock, compilation included.
"""

import argparse
import json
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stillhouse.models.causal_lm import build_model
from stillhouse.models.device import use_onednn_for_float32
from stillhouse.models.scoring import ScoringModel
from stillhouse.spec import ModelSettings

Losses = NDArray[np.float32]
_ROUNDS = 4
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # largest difference of a sequence's mean loss


def plain_loop(model: PreTrainedModel, input_ids: NDArray[Any]) -> Losses:
    """(a): all logits in float32, then a cross-entropy."""
    losses: list[torch.Tensor] = []
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # as in a fresh process
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        for ids in torch.from_numpy(input_ids.astype(np.int64)).split(32):
            logits = model(input_ids=ids).logits.float()[:, :-1]
            nll = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.append(nll.view(len(ids), -1))
    return torch.cat(losses).numpy()


def kernel(model: PreTrainedModel, scorer: ScoringModel, input_ids: NDArray[Any]) -> Losses:
    """(b): the kernel, in the state a Scorer leaves its process in."""
    use_onednn_for_float32.cache_clear()
    use_onednn_for_float32()
    return scorer.token_nll(input_ids)


def build(hidden: int, length: int, vocab: int) -> PreTrainedModel:
    """A two-layer llama whose losses have a trained model's spread."""
    settings = ModelSettings(hidden_size=hidden)
    model = build_model(settings, vocab_size=vocab, sequence_length=length, seed=0, eos_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model.eval()


def measure(rows: dict[str, Callable[[], Losses]], num_tokens: int) -> list[dict[str, Any]]:
    """Time the rows in turns and compare each with the first."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    losses: dict[str, Losses] = {}
    first: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for name, run in rows.items():
            wall, cpu = perf_counter(), process_time()
            losses[name] = run()
            seconds[name].append(process_time() - cpu)
            first.setdefault(name, perf_counter() - wall)
    base = next(iter(rows))
    return [
        {
            "row": name,
            "tokens_per_s": round(num_tokens / min(seconds[name])),
            "ratio": round(min(seconds[base]) / min(seconds[name]), 2),
            "first_s": round(first[name], 2),
            "max_token_difference": float(np.abs(losses[name] - losses[base]).max()),
            "max_sequence_difference": float(
                np.abs(losses[name].mean(1) - losses[base].mean(1)).max()
            ),
        }
        for name in rows
    ]


def main() -> None:
    """Run the rows, print them, and fail where losses differ by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--compile", action="store_true", help="compiled rows too")
    parser.add_argument("--sequences", type=int, default=256)
    for name, default in (("hidden", 128), ("length", 128), ("vocab", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.hidden, options.length, options.vocab)
    shape = (options.sequences, options.length)
    ids = np.random.default_rng(0).integers(0, options.vocab, shape).astype(np.uint16)
    rows: dict[str, Callable[[], Losses]] = {"(a) plain loop": lambda: plain_loop(model, ids)}
    for compiled in (False, True) if options.compile else (False,):
        for dtype in (torch.float32, torch.bfloat16):
            scorer = ScoringModel(model, dtype=dtype, compile=compiled)
            label = f"(b) {str(dtype).removeprefix('torch.')}{' compiled' if compiled else ''}"
            rows[label] = lambda scorer=scorer: kernel(model, scorer, ids)
    results = measure(rows, ids.size)
    if options.json:
        print(json.dumps({"rows": results}))
    else:
        for row in results:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    for row in results[1:]:
        kind = "bfloat16" if "bfloat16" in row["row"] else "float32"
        if row["max_sequence_difference"] > _TOLERANCE[kind]:
            raise SystemExit(f"{row['row']}: losses differ by {row['max_sequence_difference']}")


if __name__ == "__main__":
    main()
