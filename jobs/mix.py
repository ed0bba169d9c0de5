"""`job: mix` as the verbs see it."""

from dataclasses import dataclass
from typing import Any

from stillhouse.jobs.costs import parts_row, speeds_of
from stillhouse.mixing.spec import MixSpec
from stillhouse.models.shape import model_uri, read_header
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import check_tokenizer, model_identity
from stillhouse.pipelines.mix_data import (
    GivenModels,
    ListedSource,
    MixInputs,
    given_paths,
    list_sources,
    open_sources,
)
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo, join
from stillhouse.storage.run_record import RunRecord
from stillhouse.text.tokenizer import tokenizer_identity


def list_mix(spec: MixSpec) -> "ListedMix":
    """See `stillhouse.jobs.kinds.list_job`."""
    paths = given_paths(spec)
    for key, path in paths.items():
        read_header(model_uri(path), f"{key} {path!r}")
    if spec.tokenizer.path is not None:
        check_tokenizer(spec.tokenizer, paths)
    spec.policy.check(spec.train.accumulation, spec.train.micro_batch)
    target, sources = list_sources(spec)
    return ListedMix(spec, target, tuple(sources))


@dataclass(frozen=True, slots=True)
class ListedMix:
    """A mix job whose files were listed."""

    spec: MixSpec
    target: ListedSource
    sources: tuple[ListedSource, ...]

    @property
    def files(self) -> list[list[FileInfo]]:
        """Of the target, and of each source of arms."""
        return [list(source.files) for source in (self.target, *self.sources)]

    def open(self, store: Store, *, remember: bool) -> "OpenedMix":
        """Digest the files."""
        inputs = open_sources(store, self.target, self.sources, remember=remember)
        paths = (self.spec.model.path, self.spec.reference)
        given = [
            None if path is None else model_identity(store, model_uri(path), remember=remember)
            for path in paths
        ]
        return OpenedMix(self.spec, inputs, GivenModels(given[0], given[1]))


@dataclass(frozen=True, slots=True)
class OpenedMix:
    """A mix job whose inputs are known by content."""

    spec: MixSpec
    inputs: MixInputs
    given: GivenModels

    def identity(self) -> list[Any]:
        """Of target, arms, and what is given."""
        spec, sources = self.spec, (self.inputs.target, *self.inputs.sources)
        tokenizer = spec.tokenizer.path
        return [
            [[source.listed.name, source.digests] for source in sources],
            self.inputs.broken,
            [self.given.init, self.given.reference],
            None if tokenizer is None else tokenizer_identity(tokenizer, spec.tokenizer.eos_token),
            spec.policy.identity(),
        ]

    def walk(self, ctx: Context) -> object:
        """The whole pipeline; where it begins to train is where a dry one ends."""
        from stillhouse.pipelines.mix import run_mix_job

        return run_mix_job(ctx, self.spec, self.inputs, self.given, "")

    def run(self, ctx: Context, record: RunRecord) -> dict[str, Any]:
        """The pipeline, then the report."""
        from stillhouse.pipelines.mix import run_mix_job
        from stillhouse.pipelines.mix_result import mix_result
        from stillhouse.report.page import write

        decisions = join(record.uri, "decisions")
        made = run_mix_job(ctx, self.spec, self.inputs, self.given, decisions)
        return write(mix_result(ctx, self.spec, made, record.uri))

    def estimate(self, ctx: Context, *, complete: bool) -> dict[str, dict[str, Any]]:
        """Runs, and the gradient passes of those to do; seconds as earlier runs took."""
        from stillhouse.pipelines.mix import rules_of

        speeds, spec = speeds_of(ctx.store), self.spec
        rules = rules_of(spec, [spec.max_examples or 0] * len(self.inputs.sources))
        passes = sum(rule.plan.passes(rule.slots) * rule.num_steps for rule in rules)
        runs, mix = len(spec.seeds) * len(rules), ctx.work.get("mix")
        left = runs - mix.reused if mix else runs
        asked = {
            "tokenizer": {"parts": 1},
            "arms": {"parts": 1 + len(self.inputs.sources)},
            "mix": {"parts": runs, "gradient_passes": passes * left // len(rules)},
        }
        return {
            name: parts_row(ctx.work.get(name), speeds, name, **amounts)
            for name, amounts in asked.items()
            if not complete or name in ctx.work
        }
