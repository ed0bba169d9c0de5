"""Vectors and texts with classes: rows of Parquet or JSON Lines as arrays.

Texts become tokens of the language model that classifies them: the last `length` of each, padded at
their end.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.classification.data import ClassifierData
from stillhouse.distillation.image_files import DeadImage, RawImage, Record, check_label
from stillhouse.distillation.image_sources import ClassNames, named_classes
from stillhouse.distillation.images import ImageSplits, load_images
from stillhouse.distillation.prepared import ImagesTask
from stillhouse.errors import InputError
from stillhouse.storage.filesystem import FileInfo, list_files
from stillhouse.storage.task import Place
from stillhouse.text.formats import ranked_suffixes, require_readers
from stillhouse.text.records import read_records
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.text.values import as_text, column_of, find, label, text_fault

PADDING = -1
"""Stands behind the tokens of a short text."""
_MAX_CHARS = 10_000_000

Encode = Callable[[str], NDArray[Any]]
"""A text's tokens."""


def list_rows(path: str) -> list[FileInfo]:
    """The files of rows of a folder, glob or file.

    Raises:
        InputError: there are none. MissingExtraError: what reads them is not installed.
    """
    rows, tables, _ = ranked_suffixes()
    found = list_files([path], rows, tables)
    require_readers((file.uri for file in found), "auto")
    return found


@dataclass(frozen=True, slots=True)
class RowFiles:
    """Rows as samples: vectors, or texts where there is `encode`."""

    data: ClassifierData
    encode: Encode | None

    @property
    def noun(self) -> str:
        return self.data.kind

    def list_files(self, path: str) -> list[FileInfo]:
        return list_rows(path)

    def read(self, files: Sequence[FileInfo]) -> Iterator[Record]:
        text, where = self.data.text_column or "", self.data.where
        for file in files:
            choose = partial(self._columns, file.uri)
            for row in read_records(file.uri, choose, text=text, max_chars=_MAX_CHARS):
                try:
                    if row.broken is not None:
                        raise ValueError(row.broken)
                    if any(label(find(row.values, name)) != value for name, value in where.items()):
                        continue
                    sample = self._sample(row.values)
                    yield RawImage(sample, self._label(row.values), file.name, row.row)
                except ValueError as error:
                    yield DeadImage(file.name, row.row, str(error))

    def class_names(self, files: Sequence[FileInfo]) -> ClassNames | None:
        tables = [file for file in files if file.name.lower().endswith(".parquet")]
        return named_classes(tables, self.data.label_column) if tables else None

    def stack(self, samples: Sequence[RawImage]) -> NDArray[Any]:
        if self.encode is not None:
            stacked = np.full((len(samples), self.data.length), PADDING, np.int32)
            for row, sample in zip(stacked, samples, strict=True):
                row[: len(sample.pixels)] = sample.pixels
            return stacked
        counts = Counter(len(sample.pixels) for sample in samples)
        if len(counts) > 1:
            sizes = ", ".join(f"{size} ({count})" for size, count in counts.most_common())
            raise InputError(f"vectors of several lengths: {sizes} (`data.feature_column`)")
        return np.stack([sample.pixels for sample in samples])

    def _columns(self, uri: str, schema: pa.Schema) -> list[str]:
        data = self.data
        keys = {f"data.{key}": getattr(data, key) for key in ("feature_column", "text_column")}
        keys |= {"data.label_column": data.label_column, "data.choices_column": data.choices_column}
        keys |= {f"data.where.{name}": name for name in data.where}
        wanted = {key: name for key, name in keys.items() if name is not None}
        for key, name in wanted.items():
            if column_of(schema, name) is None:
                raise InputError(
                    f"{uri!r} has no column {name!r}: set `{key}` to one of "
                    f"{', '.join(schema.names)}"
                )
        return list(dict.fromkeys(wanted.values()))

    def _sample(self, values: Mapping[str, Any]) -> NDArray[Any]:
        """ValueError where the row has none that can be used."""
        if self.encode is None:
            found = find(values, str(self.data.feature_column))
            try:
                vector = np.array(found, np.float32)
            except (TypeError, ValueError):
                vector = np.empty(0, np.float32)
            if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
                raise ValueError(f"{_short(found)} is no list of finite numbers")
            return vector
        text = as_text(find(values, str(self.data.text_column)))
        fault = text_fault(str(self.data.text_column), text)
        if fault is not None:
            raise ValueError(fault)
        tokens = self.encode(text)
        if not len(tokens):
            raise ValueError("no token in the text")
        return tokens

    def _label(self, values: Mapping[str, Any]) -> int | str:
        """ValueError where the row has none."""
        found = as_text(find(values, self.data.label_column))
        if self.data.choices_column is None:
            return check_label(found)
        choices = find(values, self.data.choices_column)
        if not isinstance(choices, list) or found not in choices:
            raise ValueError(f"the label {_short(found)} is none of the choices {_short(choices)}")
        return choices.index(found)  # pyright: ignore[reportUnknownMemberType]


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."


@dataclass(frozen=True)
class RowsTask(ImagesTask):
    """As `ImagesTask`, of vectors or of texts.

    Attributes:
        tokenizer: of texts, its folder.
        digest: of the tokenizer.
    """

    KIND: ClassVar[str] = ImagesTask.KIND

    data: ClassifierData
    tokenizer: Place[str] = ""
    digest: str = ""

    @property
    def facts(self) -> dict[str, str]:
        return {"tokenizer": self.digest} if self.digest else {}

    def read(self) -> ImageSplits:
        return load_images(self.data, RowFiles(self.data, self._encode()))

    def _encode(self) -> Encode | None:
        if not self.tokenizer:
            return None
        tokenizer = load_tokenizer(self.tokenizer)
        bos = tokenizer.bos_id("auto")
        first = np.array([] if bos is None else [bos], np.int32)

        def encode(text: str) -> NDArray[Any]:
            [ids] = tokenizer.encode_batch([text])
            kept = ids[max(0, len(ids) - self.data.length + len(first)) :].astype(np.int32)
            return np.concatenate([first, kept]) if len(kept) else kept

        return encode
