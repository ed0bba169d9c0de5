"""The kinds of jobs, what the verbs need of each, and what a step of a plan would cost.

A new kind is a spec (a `JobSpec` in `Spec` and `SPECS`), a line in `RESULTS`, a `Job` in a module
such as `jobs/select.py`, a line in `stillhouse.jobs.run.list_job`, and a function that builds its
`Result` (`pipelines/*_result.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from stillhouse.classification.spec import ClassifySpec
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import ArtifactError, SpecError
from stillhouse.generation.spec import GenerateSpec
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import Context, StepWork
from stillhouse.report.blocks import Result
from stillhouse.spec import ComputeSettings, EvaluatedSpec, JobSpec, SelectSpec
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import FileInfo, join, list_names
from stillhouse.storage.run_record import read_json, read_status
from stillhouse.training.spec import TrainSpec

CHARS_PER_TOKEN = 3.5
_MAX_RUNS = 50
_PASSES = {"train": 3, "score": 1}
"""Forward passes a token, by the first word of a step that runs a language model."""

Spec: TypeAlias = SelectSpec | TrainSpec | ClassifySpec | MixSpec | DistillSpec | GenerateSpec
"""The spec of any job but a chain; `job` says which."""
SPECS: dict[str, type[Spec]] = {
    "select": SelectSpec,
    "train": TrainSpec,
    "mix": MixSpec,
    "distill": DistillSpec,
    "generate": GenerateSpec,
}
TASKS: dict[str, type[Spec]] = {"language": TrainSpec, "classify": ClassifySpec}
"""The specs of `job: train`, by `task`."""


def spec_model(content: Mapping[str, Any]) -> type[Spec]:
    """The class of a spec's content, whose `job` is one of `SPECS`.

    Raises:
        SpecError: an unknown task.
    """
    if content["job"] != "train" or "task" not in content:
        return SPECS[content["job"]]
    task = content["task"]
    if not isinstance(task, str) or task not in TASKS:
        raise SpecError(f"`task: {task}` is not known; known for `job: train`: {', '.join(TASKS)}")
    return TASKS[task]


RESULTS = {
    "select": ("selections", "selection_fingerprint"),
    "train": ("models", "model_fingerprint"),
    "mix": ("models", "model_fingerprint"),
    "distill": ("distilled", "distilled_fingerprint"),
    "generate": ("generated", "generated_fingerprint"),
}
"""By job: the kind of its artifact, and the key of the result that holds its fingerprint."""


class Job(ABC):
    """A job of one kind. Its constructor checks the spec and lists the inputs."""

    files: list[list[FileInfo]]
    """The input files, by data source."""

    @abstractmethod
    def open(self, store: Store, *, remember: bool) -> Self:
        """Look at the content of the inputs; `remember` writes their digests to the store."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """The content of the opened inputs, without paths, as JSON values."""

    @abstractmethod
    def walk(self, ctx: Context, run_uri: str = "") -> Any:
        """Run the pipeline; with a dry context, up to the first step that has something to do."""

    @abstractmethod
    def result(self, ctx: Context, made: Any, run_uri: str) -> Result:
        """The result of a finished `walk`."""

    def models(self, made: Any) -> dict[str, Manifest]:
        """The language models of a finished `walk` that can be measured, by label."""
        return {}

    @abstractmethod
    def estimate(
        self, ctx: Context, speeds: "Speeds", *, complete: bool
    ) -> dict[str, dict[str, Any]]:
        """By step: `parts` (None: not known yet), `reused`, `tokens`, `flops`, `seconds` or None.

        Args:
            ctx: a dry context, after `walk`.
            speeds: of the store's earlier runs.
            complete: whether `walk` reached the end.
        """

    def run(self, ctx: Context, run_uri: str) -> dict[str, Any]:
        """Run the pipeline and write the report; the object that `run --json` prints."""
        from stillhouse.report.page import write

        return write(self.result(ctx, self.walk(ctx, run_uri), run_uri))


def result_artifact(result: dict[str, Any]) -> tuple[str, str]:
    """Kind and fingerprint of the artifact of a finished run.

    Raises:
        ArtifactError: a chain, which has one for each step.
    """
    if result["job"] not in RESULTS:
        raise ArtifactError(
            f"{result['run']} is a chain: name one of its steps: "
            + ", ".join(step["run"] for step in result["chain"]["steps"].values())
        )
    kind, key = RESULTS[result["job"]]
    return kind, result[key]


@dataclass(frozen=True, slots=True)
class Speeds:
    """What steps took in the newest runs of a store that did something in them.

    `flops` a second of one worker, by step and by its first word; wall `seconds` of a part, and
    those that all workers together were `busy` with it.
    """

    flops: Mapping[str, float]
    seconds: Mapping[str, float]
    busy: Mapping[str, float] = field(default_factory=dict[str, float])


def speeds_of(store: Store) -> Speeds:
    """Read from the records of a store's finished runs; nothing is tried out."""
    folder = store.path("runs")
    runs = [(read_status(join(folder, name)), join(folder, name)) for name in list_names(folder)]
    done = [(status, uri) for status, uri in runs if status and status.get("state") == "done"]
    done.sort(key=lambda run: run[0]["updated"], reverse=True)
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    worked: dict[str, float] = {}
    for status, uri in done[:_MAX_RUNS]:
        cost = (read_json(uri, "result.json") or {}).get("cost", {})
        for name, step in status["steps"].items():
            made = step.get("parts", 0) - step.get("reused", 0)
            if made <= 0 or "seconds" not in step:
                continue
            seconds.setdefault(name, step["seconds"] / made)
            busy = cost.get("device_seconds", {}).get(name, 0)
            worked.setdefault(name, busy / made)
            counted = cost.get("flops", {}).get(name, 0) * made / step["parts"]
            if busy and counted:
                flops.setdefault(name, counted / busy)
                flops.setdefault(name.split()[0], counted / busy)
    return Speeds(flops, seconds, worked)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step reads or makes.

    Attributes:
        known: tokens of the input that exists.
        new: tokens of the input that does not exist yet, in `new_parts` parts.
        flops_per_token: of a forward pass of its language model; 0 without one, None where it is
            not known.
    """

    known: float
    new: float = 0
    flops_per_token: float | None = 0
    new_parts: int = 0


def cost_row(
    name: str,
    work: StepWork | None,
    estimate: Estimate,
    speeds: Speeds,
    compute: ComputeSettings,
) -> dict[str, Any]:
    """A step as `plan --json` has it: parts (None: not known yet), reused, and what is left."""
    parts = work.parts + estimate.new_parts if work else None
    reused = work.reused if work else 0
    share_reused = work.reused / work.parts if work and work.parts else 0
    passes = _PASSES.get(name.split()[0], 0)
    left = estimate.new + estimate.known * (1 - share_reused)
    each = estimate.flops_per_token
    flops = None if each is None else passes * each * left
    width = compute.trainers if passes == 3 else compute.scorers
    return {
        "parts": parts,
        "reused": reused,
        "tokens": round(estimate.known + estimate.new),
        "flops": flops,
        "seconds": _seconds(name, parts, reused, (flops or 0) / width, speeds),
    }


def parts_row(
    work: StepWork | None, speeds: Speeds, name: str, parts: int | None = None, **amounts: int
) -> dict[str, Any]:
    """The same for a step whose tokens are not counted; `parts` where nothing was walked yet."""
    parts = work.parts if work else parts
    reused = work.reused if work else 0
    seconds = _seconds(name, parts, reused, 0, speeds)
    row = {"parts": parts, "reused": reused, "tokens": None, "flops": None, "seconds": seconds}
    return row | (amounts if parts != reused else {})


def _seconds(
    name: str, parts: int | None, reused: int, flops: float, speeds: Speeds
) -> float | None:
    """How long the parts left take; None where no run of the store tells."""
    if parts == reused:
        return 0.0
    if flops:
        speed = speeds.flops.get(name) or speeds.flops.get(name.split()[0])
        return flops / speed if speed else None
    if parts is None or name not in speeds.seconds:
        return None
    return (parts - reused) * speeds.seconds[name]


def planned_price(
    rows: Mapping[str, Mapping[str, Any]], speeds: Speeds, spec: JobSpec
) -> tuple[float, list[str]]:
    """What the steps of a plan would cost in workers, and the steps whose price is not known.

    Args:
        rows: of `plan`; of a chain or sweep their names begin with `NAME: `.
    """
    assert spec.prices is not None
    total, unknown = 0.0, list[str]()
    for full_name, row in rows.items():
        name, left = full_name.rsplit(": ", 1)[-1], (row["parts"] or 0) - row["reused"]
        if "prompt_tokens" in row:  # of endpoints
            asked = row["prompt_tokens"], row["completion_tokens"]
            total += spec.prices.of_calls(*asked)
            continue
        if row["seconds"] == 0 or (row["parts"] is not None and not left):
            continue
        speed = speeds.flops.get(name) or speeds.flops.get(name.split()[0])
        if row["flops"] and speed:
            busy = row["flops"] / speed
        elif row["parts"] is not None and name in speeds.busy:
            busy = left * speeds.busy[name]
        else:
            unknown.append(full_name)
            continue
        held = spec.compute.resources(_gpus_of(full_name, spec))
        total += spec.prices.of_compute(busy * held["num_gpus"], busy * held["num_cpus"])
    return total, unknown


def _gpus_of(step: str, spec: JobSpec) -> float:
    """The GPUs of each worker of a step; others than of models and images run on CPUs."""
    name, compute, word = step.split(": ")[0], spec.compute, step.rsplit(": ", 1)[-1].split()[0]
    own: Any = getattr(spec, "of", None) or getattr(spec, "steps", {}).get(name, spec)
    of_tasks = word == "evaluate" and isinstance(own, EvaluatedSpec)
    if word in ("score", "teacher") or of_tasks:
        return compute.gpus_of(compute.scorer)
    if isinstance(own, GenerateSpec):
        return compute.gpus_of(compute.generator)
    on_trainers = word in ("train", "mix") or isinstance(own, ClassifySpec | DistillSpec)
    return compute.trainer_gpus if on_trainers else 0
