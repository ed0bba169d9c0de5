"""A small distil job's pieces, without Ray: what tests of its stages share."""

from dataclasses import replace

from stillhouse.distillation.experts import ExpertTask, resolved
from stillhouse.distillation.matching_task import GivenExpert, MatchingTask
from stillhouse.distillation.prepared import ImageHostSettings, Preparation
from stillhouse.distillation.recipes import published
from stillhouse.distillation.spec import ExpertSettings
from stillhouse.models.network_settings import NetworkSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import commit

IMAGES = Preparation("1" * 64, False)
NETWORK = NetworkSettings(depth=2, width=3)
TEACHER = NetworkSettings(depth=2, width=3, norm="batch")
EXPERTS = resolved(ExpertSettings(count=1, epochs=3, batch_size=256))
TINY = {"images_per_class": 1, "num_iterations": 4, "num_steps": 2, "evaluate_every": 2}


def expert(seed, keep=(0, 1, 2, 3), **changes):
    settings = EXPERTS.model_copy(update={"seed": seed} | changes)
    return ExpertTask(IMAGES, NETWORK, settings, (), keep)


def matching(host, method, network=NETWORK, experts=None):
    tasks = [expert(0), expert(1)] if experts is None else experts
    names = [task.fingerprint for task in tasks]
    given = tuple(GivenExpert(n, host.store.path("trajectories", n)) for n in names)
    return MatchingTask(IMAGES, network, method, given, 3, ())


def host_of(folder, prepared=None):
    """A host with a store in `folder`; its images are those in memory, or the store's."""
    host = ImageHostSettings(IMAGES).build(Store(str(folder)))
    if prepared is not None:
        host.__dict__["prepared"] = prepared
    return host


def elsewhere(host, folder):
    """A host with another store and the same images in memory."""
    return host_of(folder, host.prepared)


def do(host, task):
    """What a worker does: the receipt."""
    return commit(host.store, task, task.run(host.store, host, None))


def sets(store, task):
    done = store.finished("distilled", task.names)
    return [done[name] for name in task.names if name in done]


def part_bytes(store, task):
    return [r.parts[0].sha256 for r in sets(store, task)]


def protocol(name="p1", epochs=2, **changes):
    asked = {"images_per_class": 1, "num_classes": 10, "learning_rate": 0.02}
    found = published(name, **asked)
    return replace(found, recipe=found.recipe.model_copy(update={"epochs": epochs} | changes))
