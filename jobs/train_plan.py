"""What the steps of a train job would cost."""

from typing import Any

from stillhouse.jobs.costs import Estimate, cost_row, speeds_of
from stillhouse.jobs.select_plan import CHARS_PER_TOKEN
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.inputs import guess_bytes
from stillhouse.pipelines.train_data import TEXT_LENGTH, TextSet, TrainInputs
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.spec import TrainSpec
from stillhouse.training.task import TokenSet


def estimate_train(
    spec: TrainSpec, inputs: TrainInputs, ctx: Context, *, complete: bool
) -> dict[str, dict[str, Any]]:
    """See `stillhouse.jobs.kinds.Opened.estimate`."""
    seen, training = inputs.tokenizer, spec.tokenizer and spec.tokenizer.train
    vocab = training.vocab_size if training else 0
    if seen is not None:
        vocab = load_tokenizer(str(seen.folder), seen.eos_token).vocab_size
    length = spec.sequence_length or inputs.sequence_length or TEXT_LENGTH
    texts = sum(_guess(one) for one in inputs.sets.values() if isinstance(one, TextSet))
    amounts = {"scan": Estimate(texts), "tokens": Estimate(texts)} if texts else {}
    tokens = spec.train.num_tokens or sum(_guess(one) for one in inputs.datasets)
    flops = None  # of a given model: counted where it is loaded
    if spec.init is None:
        flops = planned_shape(spec.model, vocab, length).flops_per_token(length)
    amounts["train"] = Estimate(tokens, flops_per_token=flops)
    speeds = speeds_of(ctx.store)
    return {
        name: cost_row(name, ctx.work.get(name), amount, speeds, spec.compute)
        for name, amount in amounts.items()
        if not complete or name in ctx.work
    }


def _guess(one: TokenSet | TextSet) -> float:
    if isinstance(one, TokenSet):
        return one.num_tokens
    return guess_bytes(one.inputs.files) / CHARS_PER_TOKEN
