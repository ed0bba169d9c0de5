"""The class that Ray Data runs beside a training worker: reads the windows of its lanes."""

from typing import Any

import pyarrow as pa

from stillhouse.errors import StillhouseError
from stillhouse.training.fetch import PartReader


class WindowReader:
    """Reads one window after another. What is wrong with a part comes back as a row.

    Args:
        reader: of all parts, in the order's numbering.
    """

    def __init__(self, reader: PartReader) -> None:
        self._reader = reader

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """The table of the window in column `window`, or `error` and `message`."""
        try:
            return self._reader.read(batch["window"][0])
        except StillhouseError as error:
            return pa.table({"error": [type(error).__name__], "message": [str(error)]})
