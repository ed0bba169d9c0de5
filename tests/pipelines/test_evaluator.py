"""Sets and controls judged without Ray: digits, few epochs, networks of a few hundred weights."""

from types import SimpleNamespace

import pytest
from small import Quiet

from stillhouse.actors.image_worker import ImageHost, ImageWork
from stillhouse.distillation.controls_job import ControlTask, run_control
from stillhouse.distillation.evaluate_job import SetSource
from stillhouse.distillation.spec import DistillSpec
from stillhouse.distillation.stored_images import ImageSourceTask, run_source
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.crew import Crew
from stillhouse.pipelines.evaluation import Evaluator
from stillhouse.storage.artifact import Store

IMAGES = "1" * 64
NARROW, WIDER = ({"name": "convnet", "depth": 2, "width": width} for width in (3, 5))


class Here(Crew):
    """A crew of this process alone; `done` are the tasks of each step."""

    done: dict[str, list]

    def _stream(self, step, kind, workers, calls):
        host = ImageHost(self._ctx.store, self._work)
        for call in calls:
            self.done.setdefault(step, []).append(call.task)
            yield host.run(call), None, 0.0


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """A store with images; three sets in it, the part of each."""
    store = Store(str(tmp_path_factory.mktemp("kitchen")))
    run_source(store, ImageSourceTask(IMAGES, spec(store).data))
    prepared = ImageWork(IMAGES, False, "cpu", 0, 1).prepare(store)
    tasks = [ControlTask(str(i) * 64, "random_real", 10 * (1 + i), i) for i in range(3)]
    parts = [run_control(store, prepared, task).parts[0] for task in tasks]
    return store, parts


def spec(store, controls=("random_real", "full"), protocol="own"):
    return DistillSpec.model_validate(
        {
            "job": "distill",
            "store": store.uri,
            "data": {"dataset": "digits", "num_images": 100},
            "network": NARROW,
            "method": {"name": "mtt", "images_per_class": 1},
            "preprocessing": {"augmentation": []},
            "evaluate": {
                "networks": [NARROW, WIDER],
                "seeds": 2,
                "epochs": 5,
                "full": {"epochs": 1},
                "protocol": protocol,
            },
            "controls": controls,
        }
    )


def evaluator(store, asked):
    ctx = Context(store, asked.compute, Quiet())
    crew = Here(ctx, ImageWork(IMAGES, False, "cpu", 0, 1))
    crew.done = {}
    return Evaluator(ctx, crew, asked, store.get_manifest("images", IMAGES), [IMAGES, False]), crew


def judged(part):
    return SetSource(part.path), part.sha256, 0.05


def test_set_and_controls_are_tested_on_every_network(kitchen):
    store, (first, second, _) = kitchen
    judge, crew = evaluator(store, spec(store))
    tests, controls = judge.final(judged(first), [("random_real", second, 130, 1)], [0.05])
    labels = ["convnet-2, width 3", "convnet-2, width 5"]
    assert list(tests) == labels
    assert [control.name for control in controls] == ["random_real", "full"]
    assert [list(control.tests) for control in controls] == [labels, labels]
    assert [control.tested.network for control in controls] == labels[:1] * 2
    assert len(crew.done["evaluate"]) == 3 * 2 * 2  # sets, networks, seeds
    assert {task.part for task in crew.done["evaluate"]} == {"test"}
    wide = {task.fingerprint for task in crew.done["evaluate"] if task.network.width == 5}
    again, crew = evaluator(store, spec(store))
    assert again.final(judged(second), [], [0.05])[1][0].tests == controls[1].tests
    assert "evaluate" not in crew.done and len(wide) == 6


@pytest.mark.parametrize("protocol", ["own", "p2", "p3"])
def test_sets_are_compared_on_the_validation_part_alone(kitchen, protocol):
    store, parts = kitchen
    judge, crew = evaluator(store, spec(store, [], protocol))
    accuracies = judge.compare("choose", [judged(part) for part in parts])
    assert [len(by_seed) for by_seed in accuracies] == [3, 3, 3]
    judge.final(judged(parts[2]), [], [0.05])
    assert {task.part for task in crew.done["choose"]} == {"validation"}
    tested = {(task.part, task.source.path) for task in crew.done["evaluate"]}
    assert tested == {("test", parts[2].path)}


def test_labels_of_many_classes_take_two_bytes():
    asked = spec(SimpleNamespace(uri="s"))
    totals = {"shape": [1, 2, 2], "class_names": ["a"] * 300}
    images = SimpleNamespace(parts=[SimpleNamespace(num_rows=600)], totals=totals)
    assert Evaluator(None, None, asked, images, [])._full_bytes() == 600 * (4 + 2)
