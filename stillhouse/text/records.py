"""Raw rows of files, of any format of `stillhouse.text.formats` or by a class of the user's.

The same reader for documents and for the rows of tasks. `documents` and
`stillhouse.mixing.preparation` check the values.

Folders named `key=value` (Hive partitions) are columns, where a spec names them: of all rows of the
files below, instead of a column of that name in the files, as Spark, DuckDB and Polars have it.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any
from urllib.parse import unquote

import pyarrow as pa

from stillhouse.custom_code import CustomCode
from stillhouse.errors import BadFileError, StillhouseError
from stillhouse.storage.filesystem import FileInfo, list_files, open_read
from stillhouse.text.decoding import FILE_ERRORS, decoded, naming_bad_file
from stillhouse.text.formats import (
    FORMATS,
    format_of,
    function_of,
    path_of,
    ranked_suffixes,
    require_readers,
)
from stillhouse.text.rows.record import ALL_ROWS, Choose, Record, Wanted, object_records

_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def list_documents(paths: Sequence[str], reader: str | CustomCode = "auto") -> list[FileInfo]:
    """The files of a format or for a reader of the user's; of any format with `auto`.

    Raises:
        InputError: nothing matches. MissingExtraError: what reads them is not installed.
    """
    found = list_files(paths, *ranked_suffixes(reader))
    require_readers((info.uri for info in found), reader)
    return found


def read_records(
    uri: str,
    choose: Choose,
    *,
    text: str,
    max_chars: int,
    given: str | CustomCode = "auto",
    wanted: Sequence[int] = ALL_ROWS,
    keys: Collection[str] = (),
) -> Iterator[Record]:
    """The raw rows of a file whose numbers are in `wanted` (a range or a sorted list), in order.

    Args:
        uri: the file.
        choose: the paths to read of a format with columns, by its schema; may raise InputError.
        text: the key of the text of a plain text file, which is one row.
        max_chars: a longer text is a broken row.
        given: the format, `auto` for that of the suffix; or the user's reader.
        wanted: numbers of rows; default all.
        keys: columns that may be keys of the file's folders.

    Raises:
        CustomCodeError: the user's reader raised something else than ValueError or EOFError.
        InputError: an unknown suffix, what `choose` raises.
        BadFileError: a truncated file, one of another format, two columns of one name.
    """
    folder = {key: value for key, value in folder_keys(uri).items() if key in keys}
    rows = _rows(uri, given, Wanted(wanted, _choosing(choose, folder), text, max_chars))
    if not folder:
        return rows
    return (row if row.broken else replace(row, values=row.values | folder) for row in rows)


def folder_keys(uri: str) -> dict[str, str | None]:
    """The Hive partitions `key=value` among the folders of a file; the innermost of a name counts.

    The value of the null partition is None.

        >>> folder_keys("s3://pool/lang=en/day=__HIVE_DEFAULT_PARTITION__/topic=my%20own/a.parquet")
        {'lang': 'en', 'day': None, 'topic': 'my own'}
    """
    folders = path_of(uri).split("/")[:-1]
    pairs = (folder.partition("=") for folder in folders if "=" in folder)
    return {
        key: None if value == _NO_PARTITION else unquote(value) or None
        for key, _, value in pairs
        if key
    }


def used_keys(uri: str, names: Iterable[str]) -> list[tuple[str, str | None]]:
    """The columns among `names` that are keys of a file's folders, with their values."""
    keys = folder_keys(uri)
    return [(name, keys[name]) for name in sorted({*names} & keys.keys())]


def _choosing(choose: Choose, folder: dict[str, str | None]) -> Choose:
    """`choose` among the columns of the file and the keys of its folders; without the latter."""

    def chosen(schema: pa.Schema) -> list[str]:
        own = [field for field in schema if field.name not in folder]
        added = [pa.field(key, pa.string()) for key in folder]
        return [path for path in choose(pa.schema([*own, *added])) if path not in folder]

    return chosen if folder else choose


def _rows(uri: str, given: str | CustomCode, wanted: Wanted) -> Iterator[Record]:
    if isinstance(given, CustomCode):
        with open_read(uri) as raw, naming_bad_file(uri):
            yield from object_records(_custom_rows(given, raw), wanted, "a dictionary")
        return
    kind = format_of(uri, given)
    with open_read(uri) as raw, naming_bad_file(uri):
        kind, stream = decoded(uri, raw, kind)
        yield from function_of(FORMATS[kind].reader)(stream, wanted)


def _custom_rows(code: CustomCode, stream: IO[bytes]) -> Iterator[Any]:
    reader = code.build({})
    try:
        yield from reader.read(stream)
    except (StillhouseError, OSError, *FILE_ERRORS):
        raise
    except ValueError as error:
        raise BadFileError(f"{code.name}: {error}") from error
    except Exception as error:
        raise code.failed("failed in `read`", error) from error
