"""Image files of every format and mode, damaged ones too."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stillhouse.distillation.image_files import decode_image

RED, WHITE = [200, 30, 60], [255, 255, 255]


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_a_damaged_image_is_decoded_or_refused_by_name(kind, data):
    pixels = np.arange(12 * 12 * 3).reshape(12, 12, 3) % 256
    good = encoded(Image.fromarray(pixels.astype(np.uint8)), kind)
    cut = data.draw(st.integers(0, len(good)))
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good[:cut] if data.draw(st.booleans()) else good)
    if position < len(bad):
        bad[position] ^= data.draw(st.integers(1, 255))
    with suppress(ValueError):  # any other error would stop a job
        assert decode_image(bytes(bad)).dtype == np.uint8


def half(mode, left, right):
    image = Image.new(mode, (4, 2), left)
    image.paste(right, (2, 0, 4, 2))
    return image


def palette(transparency):
    image = half("P", 0, 1)
    image.putpalette([*RED, 9, 9, 9])
    return encoded(image, transparency=transparency)


ON_NINE = half("RGB", tuple(RED), (9, 9, 9))
CLEAR = half("RGBA", (*RED, 255), (9, 9, 9, 0))
DECODED = {
    "RGBA": (encoded(CLEAR), RED, WHITE),
    "RGBA, half": (encoded(half("RGBA", (*RED, 255), (0, 0, 0, 51))), RED, [204, 204, 204]),
    "RGBA, opaque": (encoded(half("RGBA", (*RED, 255), (1, 2, 3, 255))), RED, [1, 2, 3]),
    "LA": (encoded(half("LA", (7, 255), (9, 0))), [7], [255]),
    "LA, opaque": (encoded(half("LA", (7, 255), (9, 255))), [7], [9]),
    "palette, one index": (palette(1), RED, WHITE),
    "palette, values": (palette(b"\xff\x00"), RED, WHITE),
    "RGB": (encoded(half("RGB", tuple(RED), (1, 2, 3))), RED, [1, 2, 3]),
    "RGB, one colour": (encoded(ON_NINE, transparency=(9, 9, 9)), RED, WHITE),
    "L": (encoded(half("L", 7, 9)), [7], [9]),
    "L, one value": (encoded(half("L", 7, 9), transparency=9), [7], [255]),
    "1": (encoded(half("1", 0, 1)), [0], [255]),
    "CMYK": (
        encoded(Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "TIFF"),
        [255, 0, 0],
        [255, 0, 0],
    ),
    "WebP": (encoded(CLEAR, "WEBP", lossless=True), RED, WHITE),
    "GIF": (encoded(Image.open(io.BytesIO(palette(1))), "GIF", transparency=1), RED, WHITE),
}


@pytest.mark.parametrize("name", DECODED)
def test_modes_are_decoded_with_white_where_they_are_transparent(name):
    data, left, right = DECODED[name]
    array = decode_image(data)
    assert (array[:, 0, 0].tolist(), array[:, 0, -1].tolist()) == (left, right)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_by_mode(mode):
    data = encoded(Image.new(mode, (4, 4), 7), "TIFF")
    with pytest.raises(ValueError, match=rf"pixels of mode '{mode}'.* are not 8 bits a channel"):
        decode_image(data)


def test_a_picture_that_claims_to_be_huge_is_refused():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    chunk += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ValueError, match="cannot decode"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk)
