"""Sets judged by fresh networks, many at once: compared on the validation part, tested once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Literal

from stillhouse.actors.image_worker import ImageCall
from stillhouse.distillation.evaluate import Protocol, ProtocolName, named_protocol
from stillhouse.distillation.evaluate_job import EvaluationTask, SetSource, run_evaluation
from stillhouse.distillation.methods import Infer, Sre2l
from stillhouse.distillation.settings import Group, PatchSettings, Recipe
from stillhouse.distillation.spec import DistillSpec, NetworkSettings
from stillhouse.distillation.storage_budget import StoredBytes, hard_label_bytes
from stillhouse.distillation.stored_sets import read_set
from stillhouse.fingerprint import fingerprint
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.crew import Crew
from stillhouse.storage.artifact import Manifest, PartRef, Receipt
from stillhouse.storage.parquet import read_table

EVALUATION_VERSION = 2
Judged = tuple[SetSource, str, float | None]
"""A set, the sha256 of its part, and its learned learning rate."""
ControlSet = tuple[str, PartRef, int, float]
"""Name, part, bytes, and images per class, which may be no whole number."""
TestTask = Callable[[NetworkSettings, int], EvaluationTask]
"""The test of a set on a network, by seed."""


@dataclass(frozen=True, slots=True)
class Tested:
    """Test accuracies in [0, 1] of fresh networks.

    Attributes:
        network: what people call it.
        accuracies: by seed.
        seconds: of all its trainings.
    """

    network: str
    accuracies: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Over the seeds, 0 for one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Control:
    """A control that was tested; `tests` by network, the spec's first one first."""

    name: str
    num_bytes: int
    images_per_class: float
    tests: dict[str, Tested]

    @property
    def tested(self) -> Tested:
        """On the network that the set was chosen for."""
        return next(iter(self.tests.values()))


def protocol_name(spec: DistillSpec) -> ProtocolName:
    """The protocol that was named, else the one that the method's family trains by."""
    if spec.evaluate.protocol != "own":
        return spec.evaluate.protocol
    if spec.matching:
        return "p1"
    return "p2" if isinstance(spec.method, Sre2l | Infer) else "p3"


def set_protocol(spec: DistillSpec, num_classes: int, learning_rate: float | None) -> Protocol:
    """How networks are trained on the set of a job."""
    method = spec.method
    return named_protocol(
        protocol_name(spec),
        spec.evaluate,
        images_per_class=method.images_per_class,
        num_classes=num_classes,
        learning_rate=learning_rate,
        factor=method.factor if isinstance(method, PatchSettings) else 1,
        flips=spec.flips,
    )


def set_augmentation(spec: DistillSpec) -> tuple[Group, ...]:
    """DSA's groups belong to p1 alone; the others have views."""
    return tuple(spec.preprocessing.augmentation) if protocol_name(spec) == "p1" else ()


class Evaluator:
    """Trains and tests the networks of one job; equal evaluations are done once."""

    def __init__(
        self,
        ctx: Context,
        crew: Crew,
        spec: DistillSpec,
        images: Manifest,
        base: list[object],
    ) -> None:
        self._ctx, self._crew, self._spec = ctx, crew, spec
        self._images, self._base = images, base
        self._classes = len(images.totals["class_names"])

    def compare(self, step: str, sets: Sequence[Judged]) -> list[tuple[float, ...]]:
        """Accuracies on the validation part, by set and seed, of the first network."""
        network, seeds = self._spec.networks[0], range(self._spec.evaluate.choose_seeds)
        tasks = [self._task(one, "validation", network, seed) for one in sets for seed in seeds]
        receipts = iter(self._run(step, tasks))
        return [tuple(next(receipts).info["accuracy"] for _ in seeds) for _ in sets]

    def final(
        self, best: Judged, controls: Sequence[ControlSet], rates: Sequence[float | None]
    ) -> tuple[dict[str, Tested], list[Control]]:
        """The one look at the test set: the chosen set and the controls, on every network.

        A control's learning rate is the better of `rates` on the validation part.
        """
        sets = [best, *self._tuned(controls, rates)]
        makers: list[TestTask] = [partial(self._task, one, "test") for one in sets]
        described = [(name, cost, count) for name, _, cost, count in controls]
        if "full" in self._spec.controls:
            makers.append(self._full)
            described.append(("full", self._full_bytes(), 0))
        tests, *tables = self._on_networks(makers)
        found = [Control(*row, table) for row, table in zip(described, tables, strict=True)]
        return tests, found

    def _on_networks(self, makers: Sequence[TestTask]) -> list[dict[str, Tested]]:
        """By set, then by network: fresh ones of every seed, all at once."""
        # seeds of their own: those that compared sets had others
        seeds, networks = range(100, 100 + self._spec.evaluate.seeds), self._spec.networks
        tasks = [make(n, seed) for make in makers for n in networks for seed in seeds]
        receipts = iter(self._run("evaluate", tasks))
        return [
            {n.label: self._tested(n, [next(receipts) for _ in seeds]) for n in networks}
            for _ in makers
        ]

    def stored_bytes(self, part: PartRef) -> StoredBytes:
        """What a set says that it costs to store."""
        store = self._ctx.store
        return read_set(read_table(store.path(part.path)), part.path).stored

    def _tuned(self, controls: Sequence[ControlSet], rates: Sequence[float | None]) -> list[Judged]:
        sources = [(SetSource(part.path), part.sha256) for _, part, _, _ in controls]
        if len(rates) < 2 or not controls:
            return [(source, sha, rates[0]) for source, sha in sources]
        tried: list[Judged] = [(source, sha, rate) for source, sha in sources for rate in rates]
        accuracies = [fmean(a) for a in self.compare("tune controls", tried)]
        width = len(rates)
        return [
            max(
                zip(tried[i : i + width], accuracies[i : i + width], strict=True),
                key=lambda pair: pair[1],
            )[0]
            for i in range(0, len(tried), width)
        ]

    def _full_bytes(self) -> int:
        channels, height, width = self._images.totals["shape"]
        count = self._images.parts[0].num_rows
        return count * channels * height * width + hard_label_bytes(count, self._classes)

    def _tested(self, network: NetworkSettings, receipts: Sequence[Receipt]) -> Tested:
        return Tested(
            network.label,
            tuple(r.info["accuracy"] for r in receipts),
            sum(r.info["seconds"] for r in receipts),
        )

    def _full(self, network: NetworkSettings, seed: int) -> EvaluationTask:
        recipe = self._spec.evaluate.full
        protocol = Protocol(recipe, 1.0)
        groups = tuple(self._spec.preprocessing.augmentation) if self._spec.matching else ()
        return self._named(SetSource(None), "all", network, protocol, groups, "test", seed)

    def _task(
        self,
        judged: Judged,
        part: Literal["validation", "test"],
        network: NetworkSettings,
        seed: int,
    ) -> EvaluationTask:
        source, sha, rate = judged
        groups = set_augmentation(self._spec)
        protocol = set_protocol(self._spec, self._classes, rate)
        return self._named(source, sha, network, protocol, groups, part, seed)

    def _named(
        self,
        source: SetSource,
        sha: str,
        network: NetworkSettings,
        protocol: Protocol,
        groups: tuple[Group, ...],
        part: Literal["validation", "test"],
        seed: int,
    ) -> EvaluationTask:
        labels = [source.label_path, source.label_kind, source.distances.model_dump()]
        recipe: Recipe = protocol.recipe
        name = fingerprint(
            [
                "evaluate",
                EVALUATION_VERSION,
                self._base,
                [sha, labels],
                network.model_dump(),
                [recipe.model_dump(), protocol.temperature],
                [groups, part, seed],
            ]
        )
        return EvaluationTask(name, source, network, protocol, groups, part, seed)

    def _run(self, step: str, tasks: Sequence[EvaluationTask]) -> list[Receipt]:
        once = list({task.fingerprint: task for task in tasks}.values())
        calls = [ImageCall(run_evaluation, task) for task in once]
        made = self._crew.do(step, "distilled", calls, workers=self._ctx.compute.evaluators)
        by_name = {task.fingerprint: r for task, r in zip(once, made, strict=True)}
        return [by_name[task.fingerprint] for task in tasks]
