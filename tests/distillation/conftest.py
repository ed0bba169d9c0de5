"""Images and experts that tests of a job's stages start from."""

import pytest
from stages import IMAGES, do, expert, host_of

from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.prepared import ImagesTask


@pytest.fixture(scope="module")
def digits_host(tmp_path_factory):
    """A host whose store has images and two experts."""
    host = host_of(tmp_path_factory.mktemp("digits"))
    do(host, ImagesTask(IMAGES, ImageData(dataset="digits", num_images=200)))
    for seed in (0, 1):
        do(host, expert(seed))
    return host
