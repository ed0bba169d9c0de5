"""Evaluation of sets by fresh networks: compared on the validation part, tested once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

from stillhouse.distillation.prepared import Preparation
from stillhouse.distillation.recipes import Protocol
from stillhouse.distillation.set_tasks import EvaluationTask, SetSource
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.stored_sets import hard_label_bytes
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Manifest, PartRef, Receipt
from stillhouse.storage.task import Task

Do = Callable[[str, Sequence[Task], int], list[Receipt]]
"""Does the tasks of a step on at most so many workers."""
RatedSet = tuple[SetSource, float | None]
"""A set, and its learned learning rate."""
_TEST_SEEDS = 100
"""First seed of the tested networks; the networks that compare sets have other seeds."""


@dataclass(frozen=True, slots=True)
class Tested:
    """Test accuracies in [0, 1] of fresh networks, by seed."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.accuracies)

    @property
    def std(self) -> float:
        """The sample standard deviation, 0 for one seed."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def numbers(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "seeds": len(self.accuracies)}


@dataclass(frozen=True, slots=True)
class Control:
    """A baseline; `tests` by network, the spec's first one first, once it is tested."""

    name: str
    part: PartRef | None
    num_bytes: int
    images_per_class: float
    tests: dict[str, Tested] = field(default_factory=dict[str, Tested])

    @property
    def tested(self) -> Tested:
        """On the network that the set was chosen for."""
        return next(iter(self.tests.values()))


class Evaluator:
    """Trains and tests the networks of one job; equal evaluations are done once."""

    def __init__(
        self, do: Do, spec: DistillSpec, images: Manifest, preparation: Preparation
    ) -> None:
        self._do, self._spec, self._images, self._preparation = do, spec, images, preparation
        self._classes = len(images.totals["class_names"])

    def compare(self, step: str, sets: Sequence[RatedSet]) -> list[tuple[float, ...]]:
        """Accuracies of the first network on the validation part, by set and seed."""
        network, seeds = self._spec.networks[0], range(self._spec.evaluate.choose_seeds)
        tasks = [self._task(one, "validation", network, seed) for one in sets for seed in seeds]
        accuracies = iter(self._run(step, tasks))
        return [tuple(next(accuracies) for _ in seeds) for _ in sets]

    def test(
        self, best: RatedSet, controls: Sequence[Control]
    ) -> tuple[dict[str, Tested], list[Control]]:
        """The single use of the test set: the chosen set and the controls, on every network.

        A control's learning rate is the default or the set's, whichever does better on the
        validation part.
        """
        sets = [best, *self._with_rates([SetSource(c.part) for c in controls], best[1])]
        makers: list[Callable[[NetworkSettings, int], EvaluationTask]] = [
            lambda network, seed, one=one: self._task(one, "test", network, seed) for one in sets
        ]
        controls = list(controls)
        if "full" in self._spec.controls:
            makers.append(self._full)
            controls.append(Control("full", None, self._full_bytes(), 0))
        seeds = range(_TEST_SEEDS, _TEST_SEEDS + self._spec.evaluate.seeds)
        networks = self._spec.networks
        tasks = [make(n, seed) for make in makers for n in networks for seed in seeds]
        accuracies = iter(self._run("evaluate", tasks))
        tests, *of_controls = (
            {n.label: Tested(tuple(next(accuracies) for _ in seeds)) for n in networks}
            for _ in makers
        )
        return tests, [replace(c, tests=t) for c, t in zip(controls, of_controls, strict=True)]

    def _with_rates(self, sources: Sequence[SetSource], rate: float | None) -> list[RatedSet]:
        if rate is None or not sources:
            return [(source, None) for source in sources]
        pairs = [((source, None), (source, rate)) for source in sources]
        means = [fmean(a) for a in self.compare("tune controls", [p for two in pairs for p in two])]
        return [two[means[2 * i + 1] > means[2 * i]] for i, two in enumerate(pairs)]

    def _full_bytes(self) -> int:
        channels, height, width = self._images.totals["shape"]
        count = self._images.parts[0].num_rows
        return count * channels * height * width + hard_label_bytes(count, self._classes)

    def _full(self, network: NetworkSettings, seed: int) -> EvaluationTask:
        protocol = Protocol(self._spec.evaluate.full, 1.0)
        groups = tuple(self._spec.preprocessing.augmentation) if self._spec.matching else ()
        all_real = SetSource(None)
        return EvaluationTask(self._preparation, all_real, network, protocol, groups, "test", seed)

    def _task(
        self,
        rated: RatedSet,
        part: Literal["validation", "test"],
        network: NetworkSettings,
        seed: int,
    ) -> EvaluationTask:
        source, rate = rated
        groups, protocol = self._spec.set_augmentation, self._spec.protocol(self._classes, rate)
        return EvaluationTask(self._preparation, source, network, protocol, groups, part, seed)

    def _run(self, step: str, tasks: Sequence[EvaluationTask]) -> list[float]:
        """The accuracies."""
        unique = list({task.fingerprint: task for task in tasks}.values())
        receipts = self._do(step, unique, self._spec.compute.evaluators)
        by_name = {receipt.task: receipt.info["accuracy"] for receipt in receipts}
        return [by_name[task.fingerprint] for task in tasks]
