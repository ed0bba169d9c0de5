"""Image folders that bring their own validation part."""

import numpy as np
import pytest
from test_images import encoded, load, write_folder

from stillhouse.errors import InputError


def test_a_validation_folder_beside_a_test_folder_is_what_is_chosen_on(tmp_path):
    for part, per_class in (("train", 4), ("val", 3), ("test", 2)):
        write_folder(tmp_path / part, ["a", "b"], per_class)
    (tmp_path / "val" / "a" / "bad.png").write_bytes(b"hello")
    parts = load(tmp_path, max_bad_rows=1)
    assert [len(p) for p in (parts.train, parts.validation, parts.test)] == [8, 6, 4]
    assert [d.reason for d in parts.validation.dead_letters]
    (tmp_path / "val" / "a" / "0.png").write_bytes(encoded(np.zeros((4, 4, 3))))
    assert load(tmp_path, max_bad_rows=1).train.shape == (3, 4, 4)


def test_a_validation_folder_stands_in_for_a_missing_test_folder(tmp_path):
    for part, per_class in (("train", 10), ("valid", 3)):
        write_folder(tmp_path / part, ["a", "b"], per_class)
    parts = load(tmp_path)
    assert [len(p) for p in (parts.train, parts.validation, parts.test)] == [18, 2, 6]
    assert not parts.validation.dead_letters


def test_validation_images_of_another_size_are_refused(tmp_path):
    for part, size in (("train", 4), ("val", 5), ("test", 4)):
        write_folder(tmp_path / part, ["a", "b"], size=size)
    with pytest.raises(InputError, match="images of 4x4, validation images of 5x5"):
        load(tmp_path)
