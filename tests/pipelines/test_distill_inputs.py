"""What a distillation refuses once its images are known, and what identifies its inputs."""

import numpy as np
import pytest
from torch import nn

from stillhouse.distillation.images import ImageSet
from stillhouse.distillation.matching_task import GivenExpert
from stillhouse.distillation.prepared import check_networks, images_table
from stillhouse.distillation.recipes import DSA_GROUPS
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import ArtifactError, BudgetError, InputError, ModelError, SpecError
from stillhouse.pipelines.distill import check_counts
from stillhouse.pipelines.image_inputs import open_images
from stillhouse.storage.artifact import Manifest, Store

PLAIN = {"name": "convnet", "depth": 2, "width": 2}
TEACHER = PLAIN | {"norm": "batch"}
DEEP, BROKEN = {"depth": 7}, {"name": "factory", "factory": f"{__name__}:failing"}
NAMES = ("cat", "dog", "fox")


def plain(image_size, num_classes, **_):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, num_classes))


def failing(**_):
    raise ValueError("no such width")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def images(store):
    """24 images of 8x8, 7 dogs among them."""
    labels = np.repeat(np.arange(3), (9, 7, 8))
    train = ImageSet(np.zeros((24, 1, 8, 8), np.uint8), labels, NAMES)
    part = store.put_part("images/parts/train.parquet", images_table(train), num_tokens=0)
    totals = {"class_names": list(NAMES), "least_per_class": 7, "shape": [1, 8, 8]}
    return Manifest("images", "1" * 64, (part, part, part), {}, {}, totals)


def spec(method="mtt", images_per_class=1, *, factor=None, **changes):
    content = {"job": "distill", "store": "/nowhere", "data": {"dataset": "digits"}, **changes}
    if method != "mtt":
        content.setdefault("teachers", [TEACHER])
    settings = {"name": method, "images_per_class": images_per_class}
    settings |= {} if factor is None else {"factor": factor}
    return DistillSpec.model_validate(content | {"method": settings})


@pytest.mark.parametrize("method", ["mtt", "sre2l", "infer", "rded", "nrr_dd"])
def test_the_class_with_too_few_images_is_named(store, images, method):
    check_counts(store, spec(method, 7), images)
    message = r"class 'dog' has 7 training images, 8 are needed: lower `method\.images_per_class`"
    with pytest.raises(InputError, match=message):
        check_counts(store, spec(method, 8), images)


@pytest.mark.parametrize("method", ["rded", "nrr_dd"])
def test_patches_are_of_different_images(store, images, method):
    check_counts(store, spec(method, 1, factor=2), images)
    message = r"'dog' has 7 .* 8 are needed \(2 x 2 to an image\): lower .* or `method\.factor`"
    with pytest.raises(InputError, match=message):
        check_counts(store, spec(method, 2, factor=2), images)


def test_a_budget_without_a_real_image_is_refused_with_the_smallest(store, images):
    with pytest.raises(BudgetError, match=r"4 teachers and 3 classes at least 3 are needed"):
        check_counts(store, spec("infer", 2, teachers=[TEACHER] * 4), images)
    check_counts(store, spec("infer", 3, teachers=[TEACHER] * 4), images)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
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
def test_networks_that_cannot_be_built_are_named_by_their_key(method, changes, message):
    with pytest.raises(ModelError, match=message):
        check_networks(spec(method, **changes).built, (1, 8, 8), 3)


def test_networks_that_are_not_used_are_not_built():
    unused = spec("rded", network=DEEP, evaluate={"networks": [PLAIN]})
    assert [*unused.built] == ["evaluate.networks.0", "teachers.0"]
    check_networks(unused.built, (1, 8, 8), 3)


@pytest.mark.parametrize(
    ("method", "evaluate", "mix", "groups"),
    [
        ("mtt", {}, "none", DSA_GROUPS),
        ("sre2l", {}, "mixup", ()),
        ("rded", {}, "cutmix", ()),
        ("rded", {"protocol": "p1"}, "none", DSA_GROUPS),
        ("mtt", {"protocol": "p2"}, "mixup", ()),
    ],
)
def test_protocols_bring_their_augmentation(method, evaluate, mix, groups):
    asked = spec(method, evaluate=evaluate)
    assert (asked.protocol(10).recipe.views.mix, asked.set_augmentation) == (mix, groups)


def test_nothing_is_flipped_where_the_augmentation_has_no_flip():
    digits = {"preprocessing": {"augmentation": ["crop"]}}
    assert spec("rded").protocol(10).recipe.views.flip
    assert not spec("rded", **digits).protocol(10).recipe.views.flip


def test_given_experts_were_trained_on_the_same_kind_of_pixels(store):
    for name, settings in (("a", {"zca": True}), ("b", {})):
        store.put_manifest(Manifest("trajectories", name * 64, (), {}, settings))
    whitened, older = (store.path("trajectories", name * 64) for name in "ab")

    def opened(uri, zca):
        asked = spec(preprocessing={"zca": zca}, experts={"path": [uri]})
        return open_images(store, asked, [], remember=False)

    assert opened(whitened, True).experts == (GivenExpert("a" * 64, whitened),)
    with pytest.raises(ArtifactError, match=r"trained with `preprocessing.zca: true`, .* false"):
        opened(whitened, False)
    opened(older, False)  # it does not say


def with_factory(store, factory):
    network = {"name": "factory", "factory": factory}
    return open_images(store, spec(network=network), [], remember=False)


def test_the_code_of_a_users_network_is_part_of_the_identity(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h9_nets.py").write_text("def make(**_):\n    return 1\n")
    first, again = with_factory(store, "h9_nets:make"), with_factory(store, "h9_nets:make")
    assert first == again and len(first.preparation.code) == 1
    (tmp_path / "h9_nets.py").write_text("def make(**_):\n    return 2\n")
    changed = with_factory(store, "h9_nets:make")
    assert changed.preparation.images == first.preparation.images
    assert changed.identity() != first.identity()
    for factory in ("sklearn.linear_model:Ridge", "torch.nn:Linear"):  # known by their names
        assert with_factory(store, factory).preparation.code == ()
    with pytest.raises(SpecError, match="there is no module `h9_none` here"):
        with_factory(store, "h9_none:make")
