"""By which recipe, and with which augmentation, networks are trained on a set."""

import pytest

from stillhouse.distillation.recipes import DSA_GROUPS
from stillhouse.distillation.spec import DistillSpec

TEACHERS = [{"name": "convnet", "norm": "batch"}]


def spec(method, **changes):
    content = {"job": "distill", "store": "s", "data": {"dataset": "digits"}, **changes}
    if method != "mtt":
        content["teachers"] = TEACHERS
    return DistillSpec.model_validate(content | {"method": {"name": method, "images_per_class": 2}})


def protocol(found):
    return found.protocol(10)


@pytest.mark.parametrize(
    ("method", "mix", "groups"),
    [("mtt", "none", DSA_GROUPS), ("sre2l", "mixup", ()), ("rded", "cutmix", ())],
)
def test_own_protocol_is_the_familys(method, mix, groups):
    assert protocol(spec(method)).recipe.views.mix == mix
    assert spec(method).set_augmentation == groups


def test_a_named_protocol_brings_its_own_augmentation():
    assert spec("rded", evaluate={"protocol": "p1"}).set_augmentation == DSA_GROUPS
    matching = spec("mtt", evaluate={"protocol": "p2"})
    assert matching.set_augmentation == ()
    assert protocol(matching).recipe.views.mix == "mixup"


def test_nothing_is_flipped_where_the_augmentation_has_no_flip():
    digits = {"preprocessing": {"augmentation": ["crop"]}}
    assert protocol(spec("rded")).recipe.views.flip
    assert not protocol(spec("rded", **digits)).recipe.views.flip
