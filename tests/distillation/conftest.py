"""Images and experts that tests of a job's stages start from."""

import pytest
from stages import EXPERTS, IMAGES, NETWORK

from stillhouse.distillation.expert_job import (
    ExpertTask,
    run_expert,
)
from stillhouse.distillation.expert_options import expert_options
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.prepared import prepare
from stillhouse.distillation.stored_images import ImageSourceTask, run_source
from stillhouse.storage.artifact import Store


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """A store with images and two experts, and the prepared images."""
    store = Store(str(tmp_path_factory.mktemp("kitchen")))
    data = ImageData(dataset="digits", num_images=200)
    run_source(store, ImageSourceTask(IMAGES, data))
    prepared = prepare(store, IMAGES, zca=False, device="cpu", gpus=0)
    options = expert_options(EXPERTS, "mtt", ())
    for seed, name in enumerate(("a" * 64, "b" * 64)):
        task = ExpertTask(name, NETWORK, options, (0, 1, 2, 3), "float32", seed)
        run_expert(store, prepared, task)
    return store, prepared
