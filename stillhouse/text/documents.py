"""Documents out of files: Parquet, JSON and plain text, row by row.

A row that cannot be used becomes a `DeadLetter` with its address and reason; a file that cannot be
read raises `BadFileError`. Memory holds a batch of rows or one line, never a whole file. Rows are
numbered as they lie in the file, from 0; a blank JSON line is no document, but has a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from stillhouse.data_settings import DataSource
from stillhouse.errors import BadFileError, InputError
from stillhouse.text.records import ALL_ROWS, Record, read_records, too_long
from stillhouse.text.values import (
    ABSENT,
    as_text,
    column_of,
    column_paths,
    find,
    key_paths,
    label,
    text_fault,
)

_KEYS_CHARS = 200
_PREVIEW_CHARS = 200


@dataclass(frozen=True, slots=True)
class Document:
    """One usable text: raw file index, raw row, id, source label, text (valid Unicode).

    The first `prompt_chars` of the text, and `prompt_tokens` of its tokens once it has some, are a
    prompt; the rest is the answer to it. `absent` says which key that the spec names its row lacks,
    or is empty.
    """

    file: int
    row: int
    id: str
    source: str
    text: str
    absent: str = ""
    prompt_chars: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One row that was left out: its address, why, and its first 200 characters."""

    file: int
    row: int
    reason: str
    preview: str


def read_documents(
    uri: str,
    *,
    file: int,
    name: str,
    settings: DataSource,
    rows: tuple[int, int] | None = None,
    label: str | None = None,
) -> Iterator[Document | DeadLetter]:
    """Every document or dead letter of a file in order.

    Args:
        uri: the file.
        file: its index in the sorted listing, copied into the results.
        name: its path relative to the listing; `name:row` is the id of rows without one.
        settings: format, columns, default source, longest text.
        rows: half-open range of raw rows; default all.
        label: the source of all rows; default what the rows say.

    Raises:
        InputError: a named column that is missing, an unknown suffix.
        BadFileError: a truncated file, or one of another format.
    """
    wanted = range(*rows) if rows else ALL_ROWS
    yield from _Reader(uri, file, name, settings, label).read(wanted)


def read_rows(
    uri: str,
    rows: Sequence[int],
    *,
    file: int,
    name: str,
    settings: DataSource,
    label: str | None = None,
) -> Iterator[Document]:
    """The documents at the given raw rows (sorted) of a file; the rest as in `read_documents`."""
    for document in _Reader(uri, file, name, settings, label).read(rows):
        if isinstance(document, Document):
            yield document


class _Reader:
    """Judges the raw rows of a file; arguments as of `read_documents`."""

    def __init__(
        self, uri: str, file: int, name: str, settings: DataSource, source: str | None
    ) -> None:
        self._uri, self._file, self._name, self._settings = uri, file, name, settings
        self._given = source
        """The source of all rows; its column is not read then."""
        columns = settings.columns
        self._asked = {"text": columns.text, "id": columns.id}
        if columns.prompt is not None:
            self._asked["prompt"] = columns.prompt
        if source is None:
            self._asked["source"] = columns.source
        self._named = [
            (key, path)
            for key, path in self._asked.items()
            if path and key not in {"text", "prompt"}
        ]

    def read(self, wanted: Sequence[int]) -> Iterator[Document | DeadLetter]:
        """The wanted rows in order."""
        settings = self._settings
        records = read_records(
            self._uri,
            self._columns,
            text=settings.columns.text,
            max_chars=settings.max_chars,
            given=settings.format,
            wanted=wanted,
        )
        try:
            for record in records:
                yield self._judge(record)
        except BadFileError as error:
            raise BadFileError(f"{error}; repair it, or set `skip_bad_files: true`") from error

    def _columns(self, schema: pa.Schema) -> list[str]:
        """The columns of text, id and source that a Parquet file has."""
        for key, path in self._asked.items():
            if path is not None and column_of(schema, path) is None:
                paths = column_paths(schema)
                near = get_close_matches(path, paths, n=1)
                hint = f"; did you mean `{near[0]}`" if near else ""
                raise InputError(
                    f"{self._uri}: no column `{path}` (`columns.{key}`){hint}. It has "
                    f"{', '.join(paths)}"
                )
        paths = [path or key for key, path in self._asked.items()]
        return [path for path in dict.fromkeys(paths) if column_of(schema, path) is not None]

    def _judge(self, record: Record) -> Document | DeadLetter:
        """The document of a raw row, or why there is none."""
        values, settings = record.values, self._settings
        text = record.raw if record.broken else find(values, settings.columns.text)
        text = text if isinstance(text, str) else as_text(text)
        try:
            reason = record.broken or _fault(text, record, settings)
            id_ = self._label(values, "id") or f"{self._name}:{record.row}"
            source = self._given or self._label(values, "source")
            prompt = "" if reason else self._prompt(values)
        except ValueError as error:
            reason, id_, source, prompt = str(error), "", "", ""
        if reason is not None:
            return DeadLetter(self._file, record.row, _clean(reason), _preview(text))
        source = source or settings.source or "unknown"
        return Document(
            file=self._file,
            row=record.row,
            id=id_,
            source=source,
            text=prompt + text,
            absent=self._absent(values),
            prompt_chars=len(prompt),
        )

    def _prompt(self, values: dict[str, Any]) -> str:
        """What stands before the text.

        Raises:
            ValueError: the row has none.
        """
        path = self._settings.columns.prompt
        if path is None:
            return ""
        found = find(values, path)
        text = found if isinstance(found, str) else as_text(found)
        fault = f"no `{path}`" if text is None or text is ABSENT else text_fault(path, text)
        if fault is not None:
            raise ValueError(f"{fault} (`columns.prompt`)")
        return str(text)

    def _label(self, values: dict[str, Any], key: str) -> str:
        path = self._asked[key] or key
        try:
            return label(find(values, path))
        except ValueError as error:
            raise ValueError(
                f"`{path}` is {error}: name another one (`columns.{key}`), a key of an object as "
                "`a.b`"
            ) from error

    def _absent(self, values: dict[str, Any]) -> str:
        """Of id and source, the key that the spec names and an object lacks."""
        for key, path in self._named:
            if find(values, path) is ABSENT:
                return f"no key `{path}` (`columns.{key}`); keys: {_keys(values)}"
        return ""


def _keys(values: dict[str, Any]) -> str:
    return ", ".join(key_paths(values))[:_KEYS_CHARS]


def _fault(text: Any, record: Record, settings: DataSource) -> str | None:
    if text is ABSENT:
        return f"no key `{settings.columns.text}`; keys: {_keys(record.values)}"
    if text is None:
        return "null text"
    fault = text_fault("text", text)
    if fault is not None:
        return fault
    if len(text) > settings.max_chars:
        return too_long(settings.max_chars)
    return "empty text" if not text or text.isspace() else None


def _clean(text: str) -> str:
    return text.encode(errors="replace").decode()


def _preview(text: Any) -> str:
    if isinstance(text, bytes):
        text = text[: 4 * _PREVIEW_CHARS].decode(errors="replace")
    return "" if text is None else _clean(str(text)[:_PREVIEW_CHARS])
