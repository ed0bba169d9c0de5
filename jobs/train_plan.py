"""What the steps of a train job would cost."""

from typing import Any

from stillhouse.jobs.probe import probe
from stillhouse.jobs.select_plan import CHARS_PER_TOKEN, guess_bytes
from stillhouse.pipelines.context import StepWork
from stillhouse.pipelines.train_data import TEXT_LENGTH, TextSet, TokenSet, TrainInputs
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.spec import TrainSpec


def estimate_train(
    spec: TrainSpec, inputs: TrainInputs, known: dict[str, StepWork], *, complete: bool
) -> dict[str, dict[str, Any]]:
    """See `stillhouse.jobs.kinds.Opened.estimate`."""
    assert inputs.tokenizer.folder is not None
    vocab = load_tokenizer(inputs.tokenizer.folder, inputs.tokenizer.eos_token).vocab_size
    length = spec.sequence_length or inputs.sequence_length or TEXT_LENGTH
    texts = sum(_guess(one) for one in inputs.all if isinstance(one, TextSet))
    amounts = {"scan": texts, "tokens": texts} if texts else {}
    steps = {name: _step(known.get(name), amount, 0.0, None) for name, amount in amounts.items()}
    data = sum(_guess(one) for one in inputs.datasets)
    tokens = spec.train.num_tokens or data
    speed = probe(spec.model, vocab, length, spec.train, spec.compute)
    done = complete and "train" in known
    seconds = 0.0 if done else tokens / speed.training / spec.compute.trainers
    flops = 3 * speed.flops_per_token * tokens
    return {**steps, "train": _step(known.get("train"), tokens, flops, seconds)}


def _step(
    work: StepWork | None, tokens: float, flops: float, seconds: float | None
) -> dict[str, Any]:
    return {
        "parts": work.parts if work else None,
        "reused": work.reused if work else 0,
        "tokens": round(tokens),
        "flops": flops,
        "seconds": seconds,
    }


def _guess(one: TokenSet | TextSet) -> float:
    if isinstance(one, TokenSet):
        return one.num_rows * one.sequence_length
    return guess_bytes(one.inputs.files) / CHARS_PER_TOKEN
