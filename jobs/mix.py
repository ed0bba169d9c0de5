"""`job: mix` as the verbs see it."""

from dataclasses import dataclass
from typing import Any

from stillhouse.jobs.costs import parts_row, speeds_of
from stillhouse.mixing.spec import MixSpec
from stillhouse.models.shape import model_uri, read_header
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import check_tokenizer, model_identity, resolved
from stillhouse.pipelines.mix_data import MixInputs, list_sources, open_sources
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo, absolute_uri, join
from stillhouse.storage.run_record import RunRecord
from stillhouse.text.tokenizer import tokenizer_identity


def list_mix(spec: MixSpec) -> "ListedMix":
    """See `stillhouse.jobs.kinds.list_job`."""
    spec = resolved(spec, Store(absolute_uri(spec.store)))
    paths = spec.given_paths
    for key, path in paths.items():
        read_header(model_uri(path), f"{key} {path!r}")
    if spec.tokenizer.path is not None:
        check_tokenizer(spec.tokenizer, paths)
    spec.policy.check(spec.train.accumulation, spec.train.micro_batch)
    return ListedMix(spec, list_sources(spec))


@dataclass(frozen=True, slots=True)
class ListedMix:
    """A mix job whose files were listed."""

    spec: MixSpec
    inputs: MixInputs

    @property
    def files(self) -> list[list[FileInfo]]:
        """Of the target, and of each source of arms."""
        return [list(source.files) for source in (self.inputs.target, *self.inputs.sources)]

    def open(self, store: Store, *, remember: bool) -> "OpenedMix":
        """Digest the files."""
        inputs = open_sources(store, self.inputs, remember=remember)
        given = [
            None if path is None else model_identity(store, model_uri(path), remember=remember)
            for path in (self.spec.model.path, self.spec.reference)
        ]
        return OpenedMix(self.spec, inputs, given)


@dataclass(frozen=True, slots=True)
class OpenedMix:
    """A mix job whose inputs are known by content; `given`: model and DoReMi's reference."""

    spec: MixSpec
    inputs: MixInputs
    given: list[str | None]

    def identity(self) -> list[Any]:
        """Of target, arms, and what is given."""
        spec, tokenizer = self.spec, self.spec.tokenizer.path
        return [
            [[source.name, source.digests] for source in self.inputs.usable],
            [f"{name}: {why}" for name, why in self.inputs.broken.items()],
            self.given,
            None if tokenizer is None else tokenizer_identity(tokenizer, spec.tokenizer.eos_token),
            spec.policy.identity(),
        ]

    def walk(self, ctx: Context) -> object:
        """The whole pipeline; where it begins to train is where a dry one ends."""
        from stillhouse.pipelines.mix import run_mix_job

        return run_mix_job(ctx, self.spec, self.inputs, "")

    def run(self, ctx: Context, record: RunRecord) -> dict[str, Any]:
        """The pipeline, then the report."""
        from stillhouse.pipelines.mix import run_mix_job
        from stillhouse.pipelines.mix_result import mix_result
        from stillhouse.report.page import write

        decisions = join(record.uri, "decisions")
        made = run_mix_job(ctx, self.spec, self.inputs, decisions)
        return write(mix_result(ctx, self.spec, made, record.uri))

    def estimate(self, ctx: Context, *, complete: bool) -> dict[str, dict[str, Any]]:
        """Runs, and the gradient passes of those to do; seconds as earlier runs took."""
        from stillhouse.mixing.spec import rules_of

        speeds, spec = speeds_of(ctx.store), self.spec
        num_sources = len(self.inputs.usable)
        rules = rules_of(spec, [spec.max_examples or 0] * (num_sources - 1))
        passes = sum(rule.plan.passes(rule.slots) * rule.num_steps for rule in rules)
        runs, mix = len(spec.seeds) * len(rules), ctx.work.get("mix")
        left = runs - mix.reused if mix else runs
        asked = {
            "tokenizer": {"parts": 1},
            "arms": {"parts": num_sources},
            "mix": {"parts": runs, "gradient_passes": passes * left // len(rules)},
        }
        return {
            name: parts_row(ctx.work.get(name), speeds, name, **amounts)
            for name, amounts in asked.items()
            if not complete or name in ctx.work
        }
