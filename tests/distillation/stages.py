"""A small distil job's pieces, without Ray: what tests of its stages share."""

from stillhouse.distillation.evaluate import named_protocol
from stillhouse.distillation.matching_job import (
    MatchingTask,
)
from stillhouse.distillation.methods import ExpertSettings
from stillhouse.distillation.pictures import Shown
from stillhouse.distillation.spec import EvaluateSettings, NetworkSettings

IMAGES = "1" * 64
NETWORK = NetworkSettings(depth=2, width=3)
TEACHER = NetworkSettings(depth=2, width=3, norm="batch")
EXPERTS = ExpertSettings(count=1, epochs=3, batch_size=256)
NONE_SHOWN = Shown((), 0, False)
TINY = {"images_per_class": 1, "num_iterations": 4, "num_steps": 2, "evaluate_every": 2}


def matching(store, method, name="c" * 64, network=NETWORK):
    uris = tuple(store.path("trajectories", letter * 64) for letter in "ab")
    return MatchingTask(name, network, method, uris, 3, ())


def sets(store, task):
    done = store.finished("distilled", [task.receipt(p) for p in task.points])
    return [done[task.receipt(p)] for p in task.points if task.receipt(p) in done]


def part_bytes(store, task):
    return [r.parts[0].sha256 for r in sets(store, task)]


def quiet(done, total):
    pass


def recipe(**changes):
    settings = EvaluateSettings(**({"epochs": 2} | changes))
    return named_protocol("p1", settings, images_per_class=1, num_classes=10, learning_rate=0.02)
