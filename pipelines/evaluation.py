"""Sets judged by fresh networks, many at once: compared on the validation part, tested once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from stillhouse.distillation.prepared import Preparation
from stillhouse.distillation.recipes import Protocol
from stillhouse.distillation.set_tasks import EvaluationTask, SetSource
from stillhouse.distillation.spec import DistillSpec, NetworkSettings
from stillhouse.distillation.stored_sets import hard_label_bytes
from stillhouse.storage.artifact import Manifest, PartRef, Receipt
from stillhouse.storage.task import Task

Do = Callable[[str, Sequence[Task], int], list[Receipt]]
"""Does the tasks of a step on so many workers."""
Judged = tuple[SetSource, float | None]
"""A set, and its learned learning rate."""
_TEST_SEEDS = 100
"""Seeds of their own: the networks that compared sets had others."""


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
    """A control; `tests` by network, the spec's first one first, once they are made.

    Images per class may be no whole number.
    """

    name: str
    part: PartRef | None
    num_bytes: int
    images_per_class: float
    tests: dict[str, Tested]

    @property
    def tested(self) -> Tested:
        """On the network that the set was chosen for."""
        return next(iter(self.tests.values()))


class Evaluator:
    """Trains and tests the networks of one job; equal evaluations are done once."""

    def __init__(self, do: Do, spec: DistillSpec, images: Manifest, given: Preparation) -> None:
        self._do, self._spec, self._images, self._given = do, spec, images, given
        self._classes = len(images.totals["class_names"])

    def compare(self, step: str, sets: Sequence[Judged]) -> list[tuple[float, ...]]:
        """Accuracies on the validation part, by set and seed, of the first network."""
        network, seeds = self._spec.networks[0], range(self._spec.evaluate.choose_seeds)
        tasks = [self._task(one, "validation", network, seed) for one in sets for seed in seeds]
        receipts = iter(self._run(step, tasks))
        return [tuple(next(receipts).info["accuracy"] for _ in seeds) for _ in sets]

    def final(
        self, best: Judged, controls: Sequence[Control]
    ) -> tuple[dict[str, Tested], list[Control]]:
        """The one look at the test set: the chosen set and the controls, on every network.

        A control's learning rate is the default or the set's own, whichever is better on the
        validation part.
        """
        sets = [best, *self._tuned([SetSource(control.part) for control in controls], best[1])]
        makers: list[Callable[[NetworkSettings, int], EvaluationTask]] = [
            lambda network, seed, one=one: self._task(one, "test", network, seed) for one in sets
        ]
        controls = list(controls)
        if "full" in self._spec.controls:
            makers.append(self._full)
            controls.append(Control("full", None, self._full_bytes(), 0, {}))
        seeds = range(_TEST_SEEDS, _TEST_SEEDS + self._spec.evaluate.seeds)
        networks = self._spec.networks
        tasks = [make(n, seed) for make in makers for n in networks for seed in seeds]
        receipts = iter(self._run("evaluate", tasks))
        tests, *tables = (
            {n.label: _tested(n, [next(receipts) for _ in seeds]) for n in networks} for _ in makers
        )
        return tests, [
            Control(c.name, c.part, c.num_bytes, c.images_per_class, table)
            for c, table in zip(controls, tables, strict=True)
        ]

    def _tuned(self, sources: Sequence[SetSource], rate: float | None) -> list[Judged]:
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
        source = SetSource(None)
        return EvaluationTask(self._given, source, network, protocol, groups, "test", seed)

    def _task(
        self,
        judged: Judged,
        part: Literal["validation", "test"],
        network: NetworkSettings,
        seed: int,
    ) -> EvaluationTask:
        source, rate = judged
        groups, protocol = self._spec.set_augmentation, self._spec.protocol(self._classes, rate)
        return EvaluationTask(self._given, source, network, protocol, groups, part, seed)

    def _run(self, step: str, tasks: Sequence[EvaluationTask]) -> list[Receipt]:
        once = list({task.fingerprint: task for task in tasks}.values())
        made = self._do(step, once, self._spec.compute.evaluators)
        by_name = {receipt.task: receipt for receipt in made}
        return [by_name[task.fingerprint] for task in tasks]


def _tested(network: NetworkSettings, receipts: Sequence[Receipt]) -> Tested:
    accuracies = tuple(receipt.info["accuracy"] for receipt in receipts)
    return Tested(network.label, accuracies, sum(r.info["seconds"] for r in receipts))
