"""`job: mix`: its inputs, its pipeline, and what its steps would cost."""

from typing import Any

from stillhouse.jobs.kinds import Job, Speeds, parts_row
from stillhouse.mixing.spec import MixSpec
from stillhouse.models.shape import model_uri, read_header
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import check_tokenizer, model_identity, resolved
from stillhouse.pipelines.mix_data import list_sources, open_sources
from stillhouse.report.blocks import Result
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import absolute_uri, join
from stillhouse.text.tokenizer import tokenizer_identity


class MixJob(Job):
    """A mix job; `given` are the digests of its model and of DoReMi's reference model."""

    given: list[str | None]

    def __init__(self, spec: MixSpec) -> None:
        self.spec = spec = resolved(spec, Store(absolute_uri(spec.store)))
        paths = spec.given_paths
        for key, path in paths.items():
            read_header(model_uri(path), f"{key} {path!r}").check_causal()
        if spec.tokenizer.path is not None:
            check_tokenizer(spec.tokenizer, paths)
        spec.policy.check(spec.train.accumulation, spec.train.micro_batch)
        self.inputs = list_sources(spec)
        sources = (self.inputs.target, *self.inputs.sources)
        self.files = [list(source.files) for source in sources]

    def open(self, store: Store, *, remember: bool) -> "MixJob":
        self.inputs = open_sources(store, self.inputs, remember=remember)
        self.given = [
            None if path is None else model_identity(store, model_uri(path), remember=remember)
            for path in (self.spec.model.path, self.spec.reference)
        ]
        return self

    def identity(self) -> list[Any]:
        spec, tokenizer = self.spec, self.spec.tokenizer.path
        return [
            [[source.name, source.digests] for source in self.inputs.usable],
            [f"{name}: {why}" for name, why in self.inputs.broken.items()],
            self.given,
            None if tokenizer is None else tokenizer_identity(tokenizer, spec.tokenizer.eos_token),
            spec.policy.identity(),
        ]

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.mix import run_mix_job

        return run_mix_job(ctx, self.spec, self.inputs, join(run_uri, "decisions"))

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.mix_result import mix_result

        return mix_result(ctx, self.spec, made, run_uri)

    def models(self, made: Any) -> dict[str, Manifest]:
        runs = made.models.items()
        return {f"{name}, seed {seed}": model for name, of in runs for seed, model in of.items()}

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        from stillhouse.mixing.spec import rules_of

        spec = self.spec
        num_sources = len(self.inputs.usable)
        rules = rules_of(spec, [spec.max_examples or 0] * (num_sources - 1))
        passes = sum(rule.plan.passes(rule.slots) * rule.num_steps for rule in rules)
        runs, mix = len(spec.seeds) * len(rules), ctx.work.get("mix")
        left = runs - mix.reused if mix else runs
        steps = {
            "tokenizer": {"parts": 1},
            "arms": {"parts": num_sources},
            "mix": {"parts": runs, "gradient_passes": passes * left // len(rules)},
        }
        return {
            name: parts_row(ctx.work.get(name), speeds, name, **amounts)
            for name, amounts in steps.items()
            if not complete or name in ctx.work
        }
