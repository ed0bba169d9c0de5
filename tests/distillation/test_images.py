"""Sources of images: what is read, split and refused."""

import io
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from stillhouse.distillation.image_files import resize
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.images import image_set, load_images, split
from stillhouse.errors import BadFileError, InputError, SpecError

COLOUR = np.zeros((4, 4, 3))


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def grey(value, size=4):
    return np.full((size, size), value, np.uint8)


def write_folder(root, classes, per_class=4, size=4):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            data = encoded(grey(10 * number + i, size))
            (root / name / f"{i}.png").write_bytes(data)


def write_parquet(path, values, labels, names=None):
    cells = [{"bytes": encoded(grey(v)), "path": None} if v is not None else None for v in values]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": labels})
    if names:
        feature = {"label": {"names": names, "_type": "ClassLabel"}}
        info = str({"info": {"features": feature}}).replace("'", '"')
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, path)


def load(path, **keys):
    return load_images(ImageData(path=str(path), **keys))


def sizes(parts):
    return [len(part) for part in (parts.train, parts.validation, parts.test)]


def rows_of(*sets):
    return {
        (int(i.flat[0]), part.class_names[label])
        for part in sets
        for i, label in zip(part.images, part.labels, strict=True)
    }


def test_digits_come_with_three_parts_of_all_classes():
    parts = load_images(ImageData(dataset="digits"))
    assert parts.train.shape == (1, 8, 8) and len(parts.train.class_names) == 10
    assert sum(sizes(parts)) == 1797 and len(parts.test) == pytest.approx(0.2 * 1797, abs=10)
    assert all(len(np.unique(part.labels)) == 10 for part in (parts.validation, parts.test))
    assert parts.train.pixels().max() == 1 and parts.train.images.max() == 255
    again = load_images(ImageData(dataset="digits"))
    np.testing.assert_array_equal(again.train.images, parts.train.images)


def test_folder_with_train_and_test_in_order_of_numbers(tmp_path):
    write_folder(tmp_path / "train", ["10", "9", "2"])
    write_folder(tmp_path / "test", ["2", "9", "10"], per_class=1)
    parts = load(tmp_path)
    assert parts.train.class_names == parts.test.class_names == ("2", "9", "10")
    assert sizes(parts) == [9, 3, 3]
    assert rows_of(parts.test) == {(0, "2"), (10, "9"), (20, "10")}
    both = rows_of(parts.train, parts.validation)
    assert both == {(10 * c + i, n) for c, n in enumerate(["10", "9", "2"]) for i in range(4)}


def test_folder_without_a_test_part_holds_one_out(tmp_path):
    write_folder(tmp_path, ["car", "train"], per_class=10)  # a class may be called train
    parts = load(tmp_path)
    assert sizes(parts) == [14, 2, 4] and parts.train.class_names == ("car", "train")
    assert not rows_of(parts.train) & rows_of(parts.test)
    few = load(tmp_path, num_images=4).train
    assert np.bincount(few.labels).tolist() == [2, 2]


def test_a_validation_folder_is_chosen_on_or_stands_in_for_the_test_folder(tmp_path):
    for part, per_class in (("train", 10), ("val", 3)):
        write_folder(tmp_path / part, ["a", "b"], per_class)
    (tmp_path / "val" / "a" / "bad.png").write_bytes(b"hello")
    parts = load(tmp_path, max_bad_rows=1)
    assert sizes(parts) == [18, 2, 6] and not parts.validation.dead_letters
    write_folder(tmp_path / "test", ["a", "b"], 2)
    parts = load(tmp_path, max_bad_rows=1)
    assert sizes(parts) == [20, 6, 4] and parts.train.class_names == ("a", "b")
    assert [d.file for d in parts.validation.dead_letters] == ["val/a/bad.png"]
    (tmp_path / "val" / "a" / "0.png").write_bytes(encoded(COLOUR))
    assert load(tmp_path, max_bad_rows=1).train.shape == (3, 4, 4)


def test_one_colour_image_makes_all_parts_colour(tmp_path):
    for part in ("train", "test"):
        write_folder(tmp_path / part, ["a", "b"])
    (tmp_path / "train" / "a" / "0.png").write_bytes(encoded(COLOUR))
    parts = load(tmp_path)
    assert parts.train.shape == parts.validation.shape == parts.test.shape == (3, 4, 4)


def test_sizes_that_differ_are_named_unless_resized(tmp_path):
    write_folder(tmp_path / "train", ["a", "b"])
    for part, size in (("test", 6), ("val", 5)):
        write_folder(tmp_path / part, ["a", "b"], size=size)
    with pytest.raises(InputError, match=r"of 4x4, validation images of 5x5: set `data.image_size"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"of 4x4, test images of 6x6: set `data.image_size`"):
        load(tmp_path / "train", test=str(tmp_path / "test"))
    (tmp_path / "train" / "b" / "9.png").write_bytes(encoded(grey(3, 6)))
    match = r"4x4 \(8, first a/0.png\), 6x6 \(1, first b/9.png\).*data.image_size"
    with pytest.raises(InputError, match=match):
        load(tmp_path / "train")
    assert load(tmp_path, image_size=5).train.shape == (1, 5, 5)
    for path in (tmp_path / "train").glob("*/*.png"):
        path.write_bytes(encoded(np.zeros((4, 6))))
    with pytest.raises(InputError, match=r"4x6 .*not square: set `data.image_size`"):
        load(tmp_path / "train")
    assert load(tmp_path / "train", image_size=4).train.shape == (1, 4, 4)
    np.testing.assert_array_equal(resize(grey(9)[None], (7, 3)), np.full((1, 7, 3), 9))


def test_broken_images_are_dead_letters_up_to_a_limit(tmp_path):
    write_folder(tmp_path, ["a", "b"])
    (tmp_path / "a" / "bad.png").write_bytes(encoded(grey(1, 64))[:60])
    (tmp_path / "b" / "text.jpg").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"2 of 10 images .*`max_bad_rows` allows 0.1.*a/bad.png"):
        load(tmp_path)
    parts = load(tmp_path, max_bad_rows=2)
    dead = parts.train.dead_letters
    assert [d.file for d in dead] == ["a/bad.png", "b/text.jpg"] and not parts.test.dead_letters
    assert "cannot decode" in dead[0].reason
    assert dead[1].reason == "cannot decode the image: no known format"  # no address of memory
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no usable image"):
        load(tmp_path, max_bad_rows=20)


def test_images_outside_a_class_folder_and_mixed_kinds_are_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(grey(1)))
    with pytest.raises(InputError, match="lies in no class folder"):
        load(tmp_path)
    write_parquet(tmp_path / "x.parquet", [1], [0])
    with pytest.raises(InputError, match="one kind of files is needed"):
        load(tmp_path)


def test_classes_that_do_not_fit_together_are_refused(tmp_path):
    write_folder(tmp_path / "one" / "train", ["a", "b"])
    write_folder(tmp_path / "one" / "test", ["a", "c"])
    with pytest.raises(InputError, match=r"label 'c' of image 4 is out of range.*a, b"):
        load(tmp_path / "one")
    for name in ("x/a", "x/b", "y/a", "y/c"):
        write_folder(tmp_path / "two" / name.split("/")[0], [name.split("/")[1]])
    with pytest.raises(InputError, match=r"class of one name: '.*/x/a' and '.*/y/a'"):
        load(tmp_path / "two")
    assert load(tmp_path / "two" / "x").train.class_names == ("a", "b")


@pytest.mark.parametrize("content", [None, "notes.txt", "deeper/notes.txt"])
def test_a_class_folder_without_images(tmp_path, content):
    write_folder(tmp_path, ["cat", "dog"])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about the images")
    assert load(tmp_path).train.class_names == ("cat", "dog")
    (tmp_path / "unicorn" / "deeper").mkdir(parents=True)
    if content:
        (tmp_path / "unicorn" / content).write_text("no images yet")
    with pytest.raises(InputError, match=r"the folder '.*/unicorn' .* has no image: remove it"):
        load(tmp_path)


def test_a_class_folder_without_images_on_s3(bucket):
    store = fsspec.filesystem("s3")
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        store.pipe_file(f"{bucket[5:]}/{name}", encoded(grey(7)))
    store.pipe_file(f"{bucket[5:]}/unicorn/notes.txt", b"no images yet")
    with pytest.raises(InputError, match=r"the folder '.*/unicorn' .* has no image"):
        load(bucket)


def test_parquet_with_class_names_and_a_test_file(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", range(8), [0, 1] * 4, ["dog", "cat"])
    write_parquet(tmp_path / "test-0.parquet", [8, 9], [1, 0], ["dog", "cat"])
    parts = load(tmp_path)
    assert parts.train.class_names == ("dog", "cat")  # their order, not the alphabet's
    assert rows_of(parts.test) == {(8, "cat"), (9, "dog")}
    assert len(parts.train) + len(parts.validation) == 8


def test_parquet_columns_in_any_order_beside_others(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(8), ["cat", "dog"] * 4)
    table = pq.read_table(tmp_path / "a.parquet")
    table = table.select(["label", "image"]).append_column("id", pa.array(range(8)))
    pq.write_table(table.rename_columns(["kind", "picture", "id"]), tmp_path / "a.parquet")
    parts = load(tmp_path, image_column="picture", label_column="kind")
    found = rows_of(parts.train, parts.validation, parts.test)
    assert found == {(i, ["cat", "dog"][i % 2]) for i in range(8)}


def test_parquet_rows_without_image_or_label_are_dead_letters(tmp_path):
    write_parquet(tmp_path / "a.parquet", [0, None, *range(10)], [0, 0, None] + [1, 0, 1] * 3)
    dead = load(tmp_path, max_bad_rows=2).train.dead_letters
    assert [(d.row, d.reason) for d in dead] == [
        (1, "no image bytes in the row"),
        (2, "label None is neither a number nor a name"),
    ]


def test_parquet_faults_name_the_key_or_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [1, 2], [0, 1])
    with pytest.raises(InputError, match=r"set `data.image_column` to one of image, label"):
        load(path, image_column="img")
    with pytest.raises(InputError, match=r"'label' .* holds int64, not encoded images"):
        load(path, image_column="label", label_column="label")
    write_parquet(path, [1, 2], [0, 7], ["cat", "dog"])
    with pytest.raises(InputError, match=r"label 7 of image 1 is out of range.*cat, dog"):
        load(path)
    write_parquet(tmp_path / "b.parquet", [1, 2], [0, 1], ["dog", "cat"])
    with pytest.raises(InputError, match=r"classes of column 'label' differ between .*a.parquet"):
        load(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadFileError, match="as Parquet"):
        load(path)


BARE = [{"bytes": None, "path": f"{i}.png"} for i in range(4)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "paths",
    [pa.array(BARE), pa.array(BARE, STRUCT), pa.array([f"{i}.png" for i in range(4)])],
    ids=["null bytes", "no bytes", "text"],
)
def test_paths_in_place_of_images(tmp_path, paths):
    pq.write_table(pa.table({"image": paths, "label": [0, 1] * 2}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"paths are not followed, embed the images"):
        load(tmp_path)


def test_arrays_become_parquet_by_the_documented_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text()
    (recipe,) = [code for code in page.split("```python")[1:] if "np.load" in code]
    shades = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    labels = np.arange(12)[:, None] % 2
    arrays = {"x_train": shades[:8], "y_train": labels[:8]}
    np.savez("set.npz", **arrays, x_test=shades[8:], y_test=labels[8:])
    exec(recipe.split("```")[0], {})
    parts = load("images")
    assert rows_of(parts.test) == {(i, str(i % 2)) for i in range(8, 12)}
    assert rows_of(parts.train, parts.validation) == {(i, str(i % 2)) for i in range(8)}
    assert parts.train.shape == (1, 4, 4)


@pytest.mark.parametrize("name", ["set.npz", "train-images-idx3-ubyte.gz", "labels-idx1-ubyte"])
def test_files_of_arrays_are_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"any")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(SpecError, match=rf"{name}'.*not read: turn them into Parquet"):
            load(path)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 0, 0, 0], "1 class"),
        ([0, 2, 0, 2], "class '1' has no image"),
        ([0, 1, -1, 1], "label -1 of image 2 is out of range"),
        ([0, 1, 0, 10**12], "label 1000000000000 is out of range"),
        (np.array([0, "a", 0, 1], object), "neither all integers nor all names"),
        ([], "0 class"),
    ],
)
def test_invalid_labels(labels, match):
    with pytest.raises(InputError, match=match):
        image_set(np.zeros((len(labels), 1, 2, 2), np.uint8), labels)


def test_a_class_of_one_image_is_not_split():
    images = image_set(np.zeros((5, 1, 2, 2), np.uint8), ["a", "a", "b", "a", "a"])
    with pytest.raises(InputError, match=r"class 'b' has 1 image, `data.test` needs at least 2"):
        split(images, 0.5, seed=0, key="data.test")


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40), st.floats(0.05, 0.95), st.integers(0))
def test_a_split_divides_every_class_and_loses_nothing(labels, share, seed):
    labels = [*range(4), *range(4), *labels]
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    rest, part = split(image_set(pixels, labels), share, seed=seed, key="k")
    assert sorted([*rest.images.flat, *part.images.flat]) == list(range(len(labels)))
    for label in range(4):
        count = labels.count(label)
        taken = int((part.labels == label).sum())
        assert 1 <= taken <= count - 1 and abs(taken - share * count) <= 1


def test_a_source_is_files_or_a_dataset():
    for keys in ({}, {"path": "x", "dataset": "digits"}):
        with pytest.raises(ValidationError, match="either `path` or `dataset`"):
            ImageData(**keys)
    with pytest.raises(InputError, match="no files match"):
        load("/nowhere/at/all")


@pytest.mark.parametrize("name", ["folder", "one.parquet"])
def test_every_kind_of_source_is_read_from_any_filesystem(tmp_path, name):
    write_folder(tmp_path / "folder", ["a", "b"])
    write_parquet(tmp_path / "one.parquet", range(8), [0, 1] * 4)
    remote = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(str(tmp_path / name), f"{remote}/{name}", recursive=True)
    local, copied = load(tmp_path / name), load(f"{remote}/{name}")
    assert np.array_equal(local.train.images, copied.train.images)
    assert rows_of(local.test) == rows_of(copied.test)
