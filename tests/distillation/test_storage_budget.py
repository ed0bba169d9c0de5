from stillhouse.distillation.storage_budget import (
    StoredBytes,
    distance_label_bytes,
    hard_label_bytes,
    image_bytes,
    soft_label_bytes,
)


def test_images_and_labels_by_hand():
    assert image_bytes(10, (1, 28, 28)) == 7_840
    assert image_bytes(10, (3, 32, 32), 4) == 122_880
    assert hard_label_bytes(500, 10) == 500 and hard_label_bytes(500, 1_000) == 1_000
    assert soft_label_bytes(100, 10) == 2_000 and soft_label_bytes(100, 10, 4) == 4_000
    assert StoredBytes(images=3, labels=4).total == 7


def test_labels_of_imagenet_at_200_images_a_class_as_published():
    views = 300 * 200_000
    assert soft_label_bytes(views, 1_000) == 120_000_000_000
    assert distance_label_bytes(views) == 240_000_000
