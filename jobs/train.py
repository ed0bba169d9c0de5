"""`job: train`: its inputs, its pipeline, and what its steps would cost."""

from typing import Any

from stillhouse.jobs.kinds import CHARS_PER_TOKEN, Estimate, Job, Speeds, cost_row
from stillhouse.models.shape import planned_shape
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.found_weights import with_found_weights
from stillhouse.pipelines.given import resolved
from stillhouse.pipelines.inputs import guess_bytes
from stillhouse.pipelines.teachers import SIGNALS
from stillhouse.pipelines.train_data import (
    TEXT_LENGTH,
    TextSet,
    TrainInputs,
    list_data,
    open_data,
)
from stillhouse.report.blocks import Result
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import absolute_uri
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.data_spec import WeightFrom
from stillhouse.training.spec import TrainSpec, check_width
from stillhouse.training.task import TokenSet


class TrainJob(Job):
    """A train job."""

    inputs: TrainInputs

    def __init__(self, spec: TrainSpec) -> None:
        check_width(spec)
        self.spec = with_found_weights(resolved(spec, Store(absolute_uri(spec.store))))
        found = [one for one in spec.datasets if isinstance(one.weight, WeightFrom)]
        self._weights = [one.weight for one in self.spec.datasets] if found else []
        self._listing = list_data(self.spec)
        self.files = list(self._listing.values())

    def open(self, store: Store, *, remember: bool) -> "TrainJob":
        self.inputs = open_data(store, self.spec, self._listing, remember=remember)
        return self

    def identity(self) -> list[Any]:
        return [self.inputs.identity(), *([self._weights] if self._weights else [])]

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.train import run_train

        return run_train(ctx, self.spec, self.inputs)

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.train_result import train_result

        return train_result(ctx, self.spec, made, run_uri)

    def models(self, made: Any) -> dict[str, Manifest]:
        return {made.task.label: made.model}

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        spec, inputs = self.spec, self.inputs
        given, training = inputs.tokenizer, spec.tokenizer and spec.tokenizer.train
        vocab = training.vocab_size if training else 0
        if given is not None:
            vocab = load_tokenizer(str(given.folder), given.eos_token).vocab_size
        length = spec.sequence_length or inputs.sequence_length or TEXT_LENGTH
        texts = sum(_num_tokens(one) for one in inputs.sets.values() if isinstance(one, TextSet))
        steps = {"scan": Estimate(texts), "tokens": Estimate(texts)} if texts else {}
        tokens = spec.train.num_tokens or sum(
            _num_tokens(one) * one.share.one_pass for one in inputs.datasets
        )
        flops = None  # of a given model: counted where it is loaded
        if spec.init is None:
            flops = planned_shape(spec.model, vocab, length).flops_per_token(length)
        objective = spec.train.objective
        scored = len(objective.teachers) * sum(map(_num_tokens, inputs.datasets))
        if scored and objective.kept_signals == "stored":
            steps[SIGNALS] = Estimate(scored, flops_per_token=None)
        steps["train"] = Estimate(tokens, flops_per_token=flops)
        rows = {
            name: cost_row(name, ctx.work.get(name), estimate, speeds, spec.compute)
            for name, estimate in steps.items()
            if not complete or name in ctx.work
        }
        if SIGNALS in rows:
            rows[SIGNALS]["bytes"] = round(scored * objective.signal_settings.bytes_per_token)
        return rows


def _num_tokens(data: TokenSet | TextSet) -> float:
    if isinstance(data, TokenSet):
        return data.num_tokens
    return guess_bytes(data.inputs.files) / CHARS_PER_TOKEN
