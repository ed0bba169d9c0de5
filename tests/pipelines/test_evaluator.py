"""Sets and controls evaluated without Ray: digits, few epochs, tiny networks."""

from types import SimpleNamespace

import pytest

from stillhouse.distillation.prepared import ImageHostSettings, ImagesTask, Preparation
from stillhouse.distillation.set_tasks import ControlTask, SetSource
from stillhouse.distillation.spec import DistillSpec
from stillhouse.pipelines.evaluation import Control, Evaluator
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import commit

IMAGES = Preparation("1" * 64, False)
NARROW, WIDER = ({"name": "convnet", "depth": 2, "width": width} for width in (3, 5))


class Here:
    """Does tasks in this process; `done` are those of each step that were not finished."""

    def __init__(self, store):
        self.host, self.done = ImageHostSettings(IMAGES).build(store), {}

    def __call__(self, step, tasks, workers=1):
        return [self.one(step, task) for task in tasks]

    def one(self, step, task):
        store, found = self.host.store, self.host.store.finished(task.KIND, [task.fingerprint])
        if found:
            return found[task.fingerprint]
        self.done.setdefault(step, []).append(task)
        return commit(store, task, task.run(store, self.host, None))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A store with images; three sets in it, the part of each."""
    store = Store(str(tmp_path_factory.mktemp("images")))
    do = Here(store)
    do("images", [ImagesTask(IMAGES, spec(store).data)])
    tasks = [ControlTask(IMAGES, "random_real", 10 * (1 + i), i) for i in range(3)]
    return store, [receipt.parts[0] for receipt in do("controls", tasks)]


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
    do = Here(store)
    return Evaluator(do, asked, store.get_manifest("images", IMAGES.images), IMAGES), do


def sized(part):
    return SetSource(part), 0.05


def test_set_and_controls_are_tested_on_every_network(images):
    store, (first, second, _) = images
    made, here = evaluator(store, spec(store))
    tests, controls = made.test(sized(first), [Control("random_real", second, 130, 1)])
    labels = ["convnet-2, width 3", "convnet-2, width 5"]
    assert list(tests) == labels
    assert [control.name for control in controls] == ["random_real", "full"]
    assert [list(control.tests) for control in controls] == [labels, labels]
    assert len(here.done["evaluate"]) == 3 * 2 * 2  # sets, networks, seeds
    assert {task.part for task in here.done["evaluate"]} == {"test"}
    wide = {task.fingerprint for task in here.done["evaluate"] if task.network.width == 5}
    again, here = evaluator(store, spec(store))
    assert again.test(sized(second), [])[1][0].tests == controls[1].tests
    assert "evaluate" not in here.done and len(wide) == 6


@pytest.mark.parametrize("protocol", ["own", "p2", "p3"])
def test_sets_are_compared_on_the_validation_part_alone(images, protocol):
    store, parts = images
    made, here = evaluator(store, spec(store, [], protocol))
    accuracies = made.compare("choose", [sized(part) for part in parts])
    assert [len(by_seed) for by_seed in accuracies] == [3, 3, 3]
    made.test(sized(parts[2]), [])
    assert {task.part for task in here.done["choose"]} == {"validation"}
    tested = {(task.part, task.source.part) for task in here.done["evaluate"]}
    assert tested == {("test", parts[2])}


def test_labels_of_many_classes_take_two_bytes():
    asked = spec(SimpleNamespace(uri="s"))
    totals = {"shape": [1, 2, 2], "class_names": ["a"] * 300}
    images = SimpleNamespace(parts=[SimpleNamespace(num_rows=600)], totals=totals)
    assert Evaluator(None, asked, images, IMAGES)._full_bytes() == 600 * (4 + 2)
