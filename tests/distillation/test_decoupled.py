import pytest
import torch
from small_networks import PLAIN, noise, teacher

from stillhouse.distillation.decoupled import (
    RealImages,
    infer,
    nrr_dd,
    rded,
    real_images,
    sre2l,
    unit_generator,
    with_static_labels,
)
from stillhouse.distillation.images import image_set
from stillhouse.distillation.infer import CompensatorSettings
from stillhouse.distillation.labels import mean_logits
from stillhouse.distillation.nrr_dd import (
    CriticalPatchSettings,
    RefineSettings,
    activation_map,
    critical_patches,
)
from stillhouse.distillation.settings import PatchSettings, RecoverSettings
from stillhouse.distillation.sre2l import recover
from stillhouse.errors import BudgetError, InputError

REAL = RealImages(PLAIN.clip(noise(18, 1, 8, 8)), torch.arange(18) % 3, 3, PLAIN)
RECOVER = RecoverSettings(iterations=3, batch_size=4, jitter=1)
COMPENSATE = CompensatorSettings(iterations=3, jitter=1)
REFINE = RefineSettings(iterations=3, batch_size=4)

METHODS = {
    "sre2l": lambda seed: sre2l(teacher(), REAL, images_per_class=2, settings=RECOVER, seed=seed),
    "infer": lambda seed: infer(
        [teacher(), teacher(1)], REAL, images_per_class=2, settings=COMPENSATE, seed=seed
    )[0],
    "rded": lambda seed: rded(
        teacher(), REAL, images_per_class=2, settings=PatchSettings(), seed=seed
    ),
    "nrr_dd": lambda seed: nrr_dd(
        teacher(),
        REAL,
        images_per_class=2,
        patches=CriticalPatchSettings(),
        settings=REFINE,
        seed=seed,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_pixels_of_every_class(method):
    first, again, other = (METHODS[method](seed) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    counts = torch.bincount(first.labels)
    assert len(counts) == 3 and len(set(counts.tolist())) == 1
    pixels = PLAIN.pixels(first.images)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


@pytest.mark.parametrize("method", ["sre2l", "rded", "nrr_dd"])
def test_images_are_8_bits_and_labels_are_counted(method):
    made = METHODS[method](0)
    again = PLAIN.from_bytes(PLAIN.to_bytes(made.images))
    assert torch.equal(made.images, again)
    assert (made.stored.images, made.stored.labels) == (6 * 64, 6)
    teachers = [teacher(), teacher(1)]
    soft = with_static_labels(made, teachers)
    assert (soft.stored.images, soft.stored.labels) == (6 * 64, 6 * 3 * 2)
    torch.testing.assert_close(soft.label_logits, mean_logits(teachers, made.images).half())


def test_a_worker_makes_its_unit_without_the_others():
    whole = METHODS["sre2l"](7)
    unit = recover(
        teacher(),
        torch.tensor([1, 2]),
        (1, 8, 8),
        RECOVER,
        PLAIN,
        rng=unit_generator(7, 1),
    )[0]
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(PLAIN.to_bytes(whole.images[4:]), PLAIN.to_bytes(unit))


def test_infer_stores_its_parts_and_refuses_too_small_a_budget():
    teachers = [teacher(), teacher(1)]
    made, parts = infer(teachers, REAL, images_per_class=4, settings=COMPENSATE, seed=0)
    # K = 4 * 3 // (3 + 2) = 2 real images of each class, 2 * 2 compensators
    assert made.stored.images == 2 * 3 * 64 + 2 * 2 * 64
    assert made.stored.labels == 18 * 3 * 2 and made.images.shape == (18, 1, 8, 8)
    assert torch.equal(PLAIN.from_bytes(parts.expand()), made.images)
    originals = {tuple(image.flatten().tolist()) for image in PLAIN.to_bytes(REAL.images)}
    kept = parts.real.flatten(0, 1).flatten(1).tolist()
    assert all(tuple(image) in originals for image in kept)
    with pytest.raises(BudgetError, match="at least 2 are needed"):
        infer(teachers, REAL, images_per_class=1, settings=COMPENSATE, seed=0)


def test_nrr_dd_refines_around_what_its_patches_show():
    made = METHODS["nrr_dd"](0)
    assert made.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for label in range(3):
        initial = critical_patches(
            teacher(),
            REAL.images,
            REAL.labels,
            label,
            images_per_class=2,
            settings=CriticalPatchSettings(),
            rng=unit_generator(0, label),
        )
        critical = activation_map(teacher(), initial, torch.full((2,), label)) >= REFINE.epsilon
        refined = made.images[made.labels == label][:, 0]
        rounded = PLAIN.from_bytes(PLAIN.to_bytes(initial))[:, 0]
        assert torch.equal(refined[critical], rounded[critical])
        assert not torch.equal(refined, rounded)


def test_more_images_than_a_class_has():
    with pytest.raises(InputError, match="class 0 has 6 training images, 7"):
        rded(teacher(), REAL, images_per_class=7, settings=PatchSettings(), seed=0)
    with pytest.raises(InputError, match="class 0 has 6 training images, 7"):
        infer([teacher()], REAL, images_per_class=10, settings=COMPENSATE, seed=0)


def test_a_set_on_a_device():
    images = image_set([[[0, 255], [0, 255]], [[255, 255], [0, 0]]], ["b", "a"])
    real = real_images(images, PLAIN, torch.device("cpu"))
    assert real.images.tolist() == [[[[-2, 2], [-2, 2]]], [[[2, 2], [-2, -2]]]]
    assert real.labels.tolist() == [1, 0] and real.shape == (1, 2, 2) and real.num_classes == 2
