"""What is refused as soon as the images are known, without any training and without Ray."""

import numpy as np
import pytest
from torch import nn

from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.prepared import check_networks, images_table
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import BudgetError, InputError, ModelError
from stillhouse.pipelines.distill import check_counts
from stillhouse.storage.artifact import Manifest, Store

TEACHER = {"name": "convnet", "depth": 2, "width": 2, "norm": "batch"}
NAMES = ("cat", "dog", "fox")
PER_CLASS = (9, 7, 8)


def plain(image_size, num_classes, **_):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes))


def failing(**_):
    raise ValueError("no such width")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def images(store):
    """24 images of 8x8, 7 dogs among them."""
    labels = np.repeat(np.arange(3), PER_CLASS)
    train = ImageSet(np.zeros((24, 1, 8, 8), np.uint8), labels, NAMES)
    part = store.put_part("images/parts/train.parquet", images_table(train), num_tokens=0)
    totals = {"class_names": list(NAMES), "least_per_class": 7, "shape": [1, 8, 8]}
    return Manifest("images", "1" * 64, (part, part, part), {}, {}, totals)


def spec(method, images_per_class, *, given=(), **changes):
    content = {"job": "distill", "store": "s", "data": {"dataset": "digits"}, **changes}
    if method != "mtt":
        content.setdefault("teachers", [TEACHER])
    asked = {"name": method, "images_per_class": images_per_class, **dict(given)}
    return DistillSpec.model_validate(content | {"method": asked})


@pytest.mark.parametrize("method", ["mtt", "sre2l", "infer", "rded", "nrr_dd"])
def test_the_class_with_too_few_images_is_named(store, images, method):
    check_counts(store, spec(method, 7), images)
    said = r"class 'dog' has 7 training images, 8 are needed: lower `method\.images_per_class`"
    with pytest.raises(InputError, match=said):
        check_counts(store, spec(method, 8), images)


@pytest.mark.parametrize("method", ["rded", "nrr_dd"])
def test_patches_are_of_different_images(store, images, method):
    check_counts(store, spec(method, 1, given={"factor": 2}), images)
    said = r"'dog' has 7 .* 8 are needed \(2 x 2 to an image\): lower .* or `method\.factor`"
    with pytest.raises(InputError, match=said):
        check_counts(store, spec(method, 2, given={"factor": 2}), images)


def test_a_budget_without_a_real_image_is_told_the_smallest(store, images):
    with pytest.raises(BudgetError, match=r"4 teachers and 3 classes at least 3 are needed"):
        check_counts(store, spec("infer", 2, teachers=[TEACHER] * 4), images)
    check_counts(store, spec("infer", 3, teachers=[TEACHER] * 4), images)


DEEP, BROKEN = {"depth": 7}, {"name": "factory", "factory": f"{__name__}:failing"}
PLAIN = {"name": "convnet", "depth": 2, "width": 2}


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("mtt", {"network": DEEP}, r"`network`: images of 8 pixels cannot be halved 7 times"),
        (
            "mtt",
            {"network": PLAIN, "evaluate": {"networks": [PLAIN, DEEP]}},
            r"`evaluate\.networks\.1`: images of 8 pixels",
        ),
        (
            "rded",
            {"network": PLAIN, "evaluate": {"networks": [BROKEN]}},
            r"`evaluate\.networks\.0`: `factory: .*:failing` raised ValueError: no such width",
        ),
        (
            "rded",
            {"network": PLAIN, "teachers": [TEACHER, TEACHER | DEEP]},
            r"`teachers\.1`: images of 8 pixels",
        ),
        (
            "rded",
            {"teachers": [BROKEN | {"factory": f"{__name__}:plain"}]},
            r"`teachers\.0` has no batch statistics to match",
        ),
        ("sre2l", {"network": DEEP}, r"`network`: images of 8 pixels"),
    ],
)
def test_networks_that_cannot_be_built_are_named_by_their_key(method, changes, said):
    with pytest.raises(ModelError, match=said):
        check_networks(spec(method, 1, **changes).built, (1, 8, 8), 3)


def test_networks_that_are_not_used_are_not_built():
    judged = spec("rded", 1, network=DEEP, evaluate={"networks": [PLAIN]})
    assert [*judged.built] == ["evaluate.networks.0", "teachers.0"]
    check_networks(judged.built, (1, 8, 8), 3)
