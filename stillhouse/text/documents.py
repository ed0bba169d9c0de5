"""Documents out of files: Parquet, JSON and plain text, row by row.

A row that cannot be used becomes a `DeadLetter` with its address and reason; a file that cannot be
read raises `BadFileError`. Memory holds a batch of rows or one line, never a whole file. Rows are
numbered from 0 in the order of the file; blank lines of JSON count, but are not documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from stillhouse.data_settings import DataSource
from stillhouse.errors import BadFileError, InputError
from stillhouse.text.chat import Messages, conversation, plain_text
from stillhouse.text.records import read_records
from stillhouse.text.rows.record import ALL_ROWS, Record, too_long
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
    """One usable text.

    Attributes:
        file, row: index of its file and number of its row there.
        id, source: labels.
        text: valid Unicode.
        absent: which key that the spec names the row lacks, or "".
        prompt_chars: how much of the beginning is a prompt, to which the rest is the answer.
        messages: the turns of a conversation, whose plain form is the text.
    """

    file: int
    row: int
    id: str
    source: str
    text: str
    absent: str = ""
    prompt_chars: int = 0
    messages: Messages | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One row that was left out: its address, the reason, and its first 200 characters."""

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
    rows: Sequence[int] = ALL_ROWS,
    label: str | None = None,
) -> Iterator[Document | DeadLetter]:
    """The documents and dead letters of a file, in order.

    Args:
        uri: the file.
        file: its index in the sorted listing, copied into the results.
        name: its path relative to the listing; `name:row` is the id of rows without one.
        settings: format, columns, default source, longest text.
        rows: numbers of the raw rows to read, sorted.
        label: the source of all rows; default the rows' own.

    Raises:
        InputError: a missing column that the spec names, an unknown suffix.
        BadFileError: a truncated file, or one of another format.
    """
    reader = _Reader(uri, file, name, settings, label)
    records = read_records(
        uri,
        reader.columns,
        text=settings.columns.text,
        max_chars=settings.max_chars,
        given=settings.reader,
        wanted=rows,
    )
    try:
        yield from map(reader.document, records)
    except BadFileError as error:
        raise BadFileError(f"{error}; repair it, or set `skip_bad_files: true`") from error


class _Reader:
    """Makes documents of the raw rows of a file; arguments as of `read_documents`."""

    def __init__(
        self, uri: str, file: int, name: str, settings: DataSource, source: str | None
    ) -> None:
        self._uri, self._file, self._name, self._settings = uri, file, name, settings
        self._source = source  # of all rows, whose column is not read then
        columns = settings.columns
        unread = {form for form in ("prompt", "messages") if getattr(columns, form) is None}
        unread |= {"text"} if columns.messages is not None else set()
        unread |= {"source"} if source is not None else set()
        self._paths: dict[str, str | None] = settings.columns.model_dump(exclude=unread)

    def columns(self, schema: pa.Schema) -> list[str]:
        """The columns to read of a Parquet file."""
        for key, path in self._paths.items():
            if path is not None and column_of(schema, path) is None:
                paths = column_paths(schema)
                near = get_close_matches(path, paths, n=1)
                hint = f"; did you mean `{near[0]}`" if near else ""
                raise InputError(
                    f"{self._uri}: no column `{path}` (`columns.{key}`){hint}. It has "
                    f"{', '.join(paths)}"
                )
        paths = [path or key for key, path in self._paths.items()]
        return [path for path in dict.fromkeys(paths) if column_of(schema, path) is not None]

    def document(self, record: Record) -> Document | DeadLetter:
        values, settings = record.values, self._settings
        text = as_text(record.raw if record.broken else find(values, settings.columns.text))
        messages = None
        try:
            if settings.columns.messages is not None and not record.broken:
                messages = self._messages(values)
                text = plain_text(messages)
            reason = record.broken or _fault(text, record, settings)
            id_ = self._label(values, "id") or f"{self._name}:{record.row}"
            source = self._source or self._label(values, "source")
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
            messages=messages,
        )

    def _messages(self, values: dict[str, Any]) -> Messages:
        """The conversation. ValueError where the row has none."""
        path = str(self._settings.columns.messages)
        try:
            return conversation(find(values, path))
        except ValueError as error:
            raise ValueError(f"`{path}` (`columns.messages`): {error}") from error

    def _prompt(self, values: dict[str, Any]) -> str:
        """The text before the answer. ValueError where the row has none."""
        path = self._settings.columns.prompt
        if path is None:
            return ""
        text = as_text(find(values, path))
        fault = f"no `{path}`" if text is None or text is ABSENT else text_fault(path, text)
        if fault is not None:
            raise ValueError(f"{fault} (`columns.prompt`)")
        return str(text)

    def _label(self, values: dict[str, Any], key: str) -> str:
        path = self._paths[key] or key
        try:
            return label(find(values, path))
        except ValueError as error:
            raise ValueError(
                f"`{path}` is {error}: name another one (`columns.{key}`), a key of an object as "
                "`a.b`"
            ) from error

    def _absent(self, values: dict[str, Any]) -> str:
        """A message about the first of id and source that the spec names and the row lacks."""
        for key in ("id", "source"):
            path = self._paths.get(key)
            if path and find(values, path) is ABSENT:
                return f"no key `{path}` (`columns.{key}`); keys: {_keys(values)}"
        return ""


def _keys(values: dict[str, Any]) -> str:
    return ", ".join(key_paths(values))[:_KEYS_CHARS]


def _fault(text: Any, record: Record, settings: DataSource) -> str | None:
    if text is ABSENT:
        hint = "; for conversations `columns: {messages: messages}`"
        hint = hint if "messages" in record.values else ""
        return f"no key `{settings.columns.text}`; keys: {_keys(record.values)}{hint}"
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
    return "" if text is None or text is ABSENT else _clean(str(text)[:_PREVIEW_CHARS])
