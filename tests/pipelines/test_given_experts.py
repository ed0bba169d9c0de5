import pytest

from stillhouse.distillation.matching_task import GivenExpert
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import ArtifactError
from stillhouse.pipelines.image_inputs import open_images
from stillhouse.storage.artifact import Manifest, Store


def spec(store, uri, zca):
    return DistillSpec.model_validate(
        {
            "job": "distill",
            "store": store.uri,
            "data": {"dataset": "digits"},
            "preprocessing": {"zca": zca},
            "experts": {"path": [uri]},
            "method": {"name": "mtt", "images_per_class": 1},
        }
    )


def test_given_experts_saw_the_same_kind_of_pixels(tmp_path):
    store = Store(str(tmp_path))
    for name, settings in (("a", {"zca": True}), ("b", {})):
        store.put_manifest(Manifest("trajectories", name * 64, (), {}, settings))
    whitened, older = (store.path("trajectories", name * 64) for name in "ab")
    found = open_images(store, spec(store, whitened, True), [], remember=False)
    assert found.experts == (GivenExpert("a" * 64, whitened),)
    with pytest.raises(ArtifactError, match=r"trained with `preprocessing.zca: true`, .* false"):
        open_images(store, spec(store, whitened, False), [], remember=False)
    open_images(store, spec(store, older, False), [], remember=False)  # it does not say
