"""A heat plot of names over time as one small image: readable with 10, 86 or 300 rows.

One pixel a cell, stretched by the page without smoothing; names stand beside their rows, all of
them where a row is as high as a line of text, every n-th where there are more.
"""

import base64
import struct
import zlib
from collections.abc import Sequence

from markupsafe import Markup

from stillhouse.report.blocks import Heat
from stillhouse.report.formatting import visible

_COPPER = (179, 98, 42)
_LINE = 10
"""Pixels of a line of small text."""
_HEIGHT = 900
"""Pixels that a plot may take before its rows get thinner than a line."""


def heat(data: Heat) -> Markup:
    """The plot: darker is a larger share, on a root scale up to the largest one."""
    count = len(data.names)
    height = max(4.0, min(16.0, _HEIGHT / count))
    every = max(1, -(-_LINE // int(height)))
    most = max(max(row) for row in data.shares) or 1.0
    names = Markup("").join(
        Markup('<bdi style="top:{:.3f}%" title="{}">{}</bdi>').format(
            100 * (i + 0.5) / count, visible(name), visible(name)
        )
        for i, name in enumerate(data.names)
        if i % every == 0
    )
    rows = [[max(0.0, share / most) ** 0.5 for share in row] for row in data.shares]
    image = base64.b64encode(_png(rows)).decode()
    return Markup(
        '<div class="heat" style="height:{}px"><div class="names">{}</div>'
        '<img alt="Shares of {} over {} steps" src="data:image/png;base64,{}"></div>'
        '<p class="steps"><span>step 1</span><span>{:,}</span></p>'
        '<p class="scale"><span>0</span><i></i><span>{:.1%} of the draws</span>'
        "<span>uniform: {:.1%}</span></p>"
    ).format(round(height * count), names, count, data.num_steps, image, data.num_steps, most,
             1 / count)  # fmt: skip


def _png(rows: Sequence[Sequence[float]]) -> bytes:
    """Cells of 0 to 1 as copper of that opacity (RGBA), which stands on any background."""
    pixels = b"".join(
        b"\0" + b"".join(bytes((*_COPPER, round(255 * cell))) for cell in row) for row in rows
    )
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 6, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
