"""Image files of every mode, with and without transparency, and folders that hide a class."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stillhouse.distillation.image_files import decode_image
from stillhouse.distillation.images import ImageData, load_images
from stillhouse.errors import InputError

RED, WHITE = [200, 30, 60], [255, 255, 255]


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(data):
    """The colour at the left and at the right of an image."""
    array = decode_image(data)
    return array[:, 0, 0].tolist(), array[:, 0, -1].tolist()


def half(mode, opaque, clear):
    """Left half one value, right half another."""
    image = Image.new(mode, (4, 2), opaque)
    image.paste(clear, (2, 0, 4, 2))
    return image


def palette(transparency):
    image = Image.new("P", (4, 2), 0)
    image.paste(1, (2, 0, 4, 2))
    image.putpalette([*RED, 9, 9, 9])
    return encoded(image, transparency=transparency)


TRANSPARENT = {
    "RGBA": (encoded(half("RGBA", (*RED, 255), (9, 9, 9, 0))), RED, WHITE),
    "half through": (encoded(half("RGBA", (*RED, 255), (0, 0, 0, 51))), RED, [204, 204, 204]),
    "LA": (encoded(half("LA", (7, 255), (9, 0))), [7], [255]),
    "palette, one index": (palette(1), RED, WHITE),
    "palette, values": (palette(b"\xff\x00"), RED, WHITE),
    "RGB, one colour": (
        encoded(half("RGB", tuple(RED), (9, 9, 9)), transparency=(9, 9, 9)),
        RED,
        WHITE,
    ),
    "grey, one value": (encoded(half("L", 7, 9), transparency=9), [7], [255]),
    "WebP": (
        encoded(half("RGBA", (*RED, 255), (9, 9, 9, 0)), "WEBP", lossless=True),
        RED,
        WHITE,
    ),
    "GIF": (
        encoded(Image.open(io.BytesIO(palette(1))), "GIF", transparency=1),
        RED,
        WHITE,
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_shows_white(kind):
    data, opaque, clear = TRANSPARENT[kind]
    assert pixel(data) == (opaque, clear)


OPAQUE = {
    "1": (half("1", 0, 1), [0], [255]),
    "L": (half("L", 7, 9), [7], [9]),
    "RGB": (half("RGB", tuple(RED), (1, 2, 3)), RED, [1, 2, 3]),
    "RGBA": (half("RGBA", (*RED, 255), (1, 2, 3, 255)), RED, [1, 2, 3]),
    "LA": (half("LA", (7, 255), (9, 255)), [7], [9]),
}


@pytest.mark.parametrize("kind", OPAQUE)
def test_opaque_images_keep_their_pixels(kind):
    image, left, right = OPAQUE[kind]
    assert pixel(encoded(image)) == (left, right)


def test_cmyk(tmp_path):
    data = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")
    assert pixel(data) == ([255, 0, 0], [255, 0, 0])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_by_mode(mode):
    data = encoded(Image.new(mode, (4, 4), 7), "TIFF")
    with pytest.raises(ValueError, match=rf"pixels of mode '{mode}'.* are not 8 bits a channel"):
        decode_image(data)


def put_images(folder, count=6):
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encoded(Image.new("L", (4, 4), i)))


def load(path, **settings):
    return load_images(ImageData(path=str(path), **settings))


def test_classes_of_one_name_in_two_places(tmp_path):
    for name in ("x/a", "x/b", "y/a", "y/c"):
        put_images(tmp_path / name)
    with pytest.raises(InputError, match=r"class of one name: '.*/x/a' and '.*/y/a'"):
        load(tmp_path)
    assert load(tmp_path / "x").train.class_names == ("a", "b")


def test_classes_of_the_parts_have_one_name(tmp_path):
    for part in ("train", "test", "val"):
        for name in ("a", "b"):
            put_images(tmp_path / part / name)
    assert load(tmp_path).train.class_names == ("a", "b")


@pytest.mark.parametrize("content", [None, "notes.txt", "deeper/notes.txt"])
def test_a_class_folder_without_images(tmp_path, content):
    put_images(tmp_path / "cat")
    put_images(tmp_path / "dog")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about the images")
    assert load(tmp_path).train.class_names == ("cat", "dog")
    (tmp_path / "unicorn" / "deeper").mkdir(parents=True)
    if content:
        (tmp_path / "unicorn" / content).write_text("no images yet")
    with pytest.raises(InputError, match=r"the folder '.*/unicorn' .* has no image: remove it"):
        load(tmp_path)


def test_a_class_folder_without_images_on_s3(bucket):
    import fsspec

    store = fsspec.filesystem("s3")
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        store.pipe_file(f"{bucket[5:]}/{name}", encoded(Image.new("L", (4, 4), 7)))
    store.pipe_file(f"{bucket[5:]}/unicorn/notes.txt", b"no images yet")
    with pytest.raises(InputError, match=r"the folder '.*/unicorn' .* has no image"):
        load(bucket)


PATHS = {
    "null bytes": pa.array([{"bytes": None, "path": f"{i}.png"} for i in range(4)]),
    "no bytes": pa.array(
        [{"bytes": None, "path": f"{i}.png"} for i in range(4)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    ),
    "text": pa.array([f"{i}.png" for i in range(4)]),
}


@pytest.mark.parametrize("kind", PATHS)
def test_paths_in_place_of_images(tmp_path, kind):
    pq.write_table(pa.table({"image": PATHS[kind], "label": [0, 1] * 2}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"paths are not followed, embed the images"):
        load(tmp_path)
