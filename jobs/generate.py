"""`job: generate`: its inputs, its pipeline, and what its steps would cost."""

from typing import Any

from stillhouse.generation.spec import GenerateSpec
from stillhouse.jobs.kinds import Job, Speeds, parts_row
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.generate_inputs import (
    GenerateInputs,
    list_generation,
    open_generation,
)
from stillhouse.pipelines.given import resolved
from stillhouse.report.blocks import Result
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import absolute_uri

_BYTES_PER_SEED = 150
_PROMPT_TOKENS = 150
"""Of a call, about; answers are taken for a quarter of their limit."""


class GenerateJob(Job):
    """A generation."""

    inputs: GenerateInputs

    def __init__(self, spec: GenerateSpec) -> None:
        self.spec = resolved(spec, Store(absolute_uri(spec.store)))
        self.files = list_generation(self.spec)

    def open(self, store: Store, *, remember: bool) -> "GenerateJob":
        self.inputs = open_generation(store, self.spec, self.files, remember=remember)
        return self

    def identity(self) -> list[Any]:
        return self.inputs.identity()

    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        from stillhouse.pipelines.generate import run_generate

        return run_generate(ctx, self.spec, self.inputs, run_uri)

    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        from stillhouse.pipelines.generate_result import generate_result

        return generate_result(ctx, self.spec, made, run_uri)

    def estimate(
        self, ctx: Context, speeds: Speeds, *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        """What was walked is exact; of the rest, about how many calls one wave takes."""
        rows = {name: parts_row(work, speeds, name) for name, work in ctx.work.items()}
        if complete:
            return rows
        seeds = max(1, self.inputs.num_bytes // _BYTES_PER_SEED)
        for name, calls in self.spec.generation.calls(seeds).items():
            if name not in rows or rows[name]["parts"] != rows[name]["reused"]:
                work = ctx.work.get(name)
                rows[name] = parts_row(work, speeds, name) | {"calls": calls}
                if any(one.endpoint is not None for one in self.spec.models.values()):
                    written = calls * self.spec.generation.max_tokens // 4
                    tokens = {"prompt_tokens": calls * _PROMPT_TOKENS, "completion_tokens": written}
                    rows[name] |= tokens
        return rows
