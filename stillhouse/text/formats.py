"""The formats that files of rows come in, by name and by suffix; light, for specs and the driver.

A format is a module of `stillhouse.text.rows` and a line in `FORMATS`. Its functions are

    read(stream, wanted)    the raw rows (`rows.record`) in what `decoding.decoded` gives
    piece_rows(stream)      rows of each of the pieces in which a large file can be read, or None
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal
from urllib.parse import urlsplit

from stillhouse.custom_code import CustomCode
from stillhouse.errors import InputError, MissingExtraError, SpecError, require
from stillhouse.storage.lance_files import is_fragment

Content = Literal["file", "text", "bytes", "opened"]
Rank = Literal["rows", "tables", "texts"]


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One format.

    Attributes:
        suffixes: how the names of its files end.
        reader: `module:function` in `stillhouse.text.rows`.
        content: what is read: the `file` itself, in which the reader seeks; its `text`,
            decompressed and in UTF-8; its decompressed `bytes`; or, `opened`, what the storage
            gives, which is more than a file.
        rank: in a folder, `tables` are read where there are no `rows`, `texts` where there is
            neither: beside data they are mostly about the data.
        pieces: the function that finds pieces.
        needs: modules of an extra.
    """

    suffixes: tuple[str, ...]
    reader: str
    content: Content = "text"
    rank: Rank = "rows"
    pieces: str | None = None
    needs: tuple[str, ...] = ()


FORMATS: dict[str, RowFormat] = {
    "parquet": RowFormat((".parquet", ".pq"), "parquet:read", "file", pieces="parquet:piece_rows"),
    "jsonl": RowFormat((".jsonl", ".ndjson", ".json"), "json_values:read"),
    "arrow": RowFormat(
        (".arrow", ".feather", ".ipc"), "arrow:read", "file", pieces="arrow:piece_rows"
    ),
    "warc": RowFormat((".warc", ".wet"), "warc:read", "bytes", needs=("warcio", "resiliparse")),
    "lance": RowFormat((".lance",), "lance_rows:read", "opened", needs=("lance",)),
    "csv": RowFormat((".csv",), "delimited:read_commas", rank="tables"),
    "tsv": RowFormat((".tsv",), "delimited:read_tabs", rank="tables"),
    "text": RowFormat((".txt", ".md", ".rst"), "plain:read", rank="texts"),
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Suffixes behind that of the format."""


def listed_suffixes(*wanted: str | CustomCode) -> tuple[str, ...]:
    """The suffixes of the files that are read in a folder: of some formats, or of a user's reader.

    Without `.json`: beside data such a file is mostly metadata. A path or glob may name it. Without
    `.lance`: it is a folder, which a path names.

    Raises:
        SpecError: the user's reader has no `suffixes`.
    """
    for code in wanted:
        if isinstance(code, CustomCode):
            suffixes = code.literal("suffixes")
            if not suffixes or not isinstance(suffixes, tuple | list):
                raise SpecError(
                    f"`format: {code.name}`: the class needs `suffixes = (...)`, how the names of "
                    "the files end that it reads in a folder"
                )
            return tuple(str(suffix).lower() for suffix in suffixes)
    forms = [FORMATS[str(name)] for name in wanted]
    suffixes = [suffix for form in forms if form.content != "opened" for suffix in form.suffixes]
    listed = [s + c for s in suffixes for c in ("", *COMPRESSIONS)]
    return tuple(suffix for suffix in listed if suffix != ".json")


def ranked_suffixes(reader: str | CustomCode = "auto") -> list[tuple[str, ...]]:
    """The suffixes that are read in a folder: of a format, of a user's reader, or with `auto` of
    all formats by rank, the first rank first.

    Raises:
        SpecError: the user's reader has no `suffixes`.
    """
    if reader != "auto":
        return [listed_suffixes(reader)]
    ranks: dict[Rank, list[str]] = {"rows": [], "tables": [], "texts": []}
    for name, form in FORMATS.items():
        ranks[form.rank].append(name)
    return [listed_suffixes(*names) for names in ranks.values()]


def format_of(uri: str, given: str = "auto") -> str:
    """The name of the format of a file; for `auto` by its suffix, upper or lower case.

    Raises:
        InputError: an unknown suffix, for `auto`.
    """
    if given != "auto":
        return given
    name = lower_name(uri)
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for kind, form in FORMATS.items():
        if name.endswith(form.suffixes):
            return kind
    known = ", ".join(suffix for form in FORMATS.values() for suffix in form.suffixes)
    raise InputError(f"{uri}: unknown suffix; known are {known}; or set `format`")


def pieces_of(uri: str) -> str | None:
    """The function that finds the pieces of a file by its suffix; None where it has none."""
    name = lower_name(uri)
    return next((f.pieces for f in FORMATS.values() if name.endswith(f.suffixes)), None)


def path_of(uri: str) -> str:
    """The URI without a version; of a web address the path alone."""
    if is_fragment(uri):
        return uri.rpartition("#")[0]
    return urlsplit(uri).path if uri.startswith(("http://", "https://")) else uri


def lower_name(uri: str) -> str:
    """What the suffix is the end of."""
    return path_of(uri).lower()


def require_readers(uris: Iterable[str], given: str | CustomCode) -> None:
    """Check that the packages which read these files are installed.

    Raises:
        MissingExtraError: naming the extra. InputError: an unknown suffix, for `auto`.
    """
    if isinstance(given, CustomCode):
        return
    for kind in {format_of(uri, given) for uri in uris}:
        require(*FORMATS[kind].needs)


def function_of(reader: str) -> Any:
    """A function `module:name` of a format.

    Raises:
        MissingExtraError: an extra is not installed.
    """
    module, _, name = reader.partition(":")
    try:
        return getattr(import_module(f"stillhouse.text.rows.{module}"), name)
    except ImportError as error:
        raise MissingExtraError.of(error) or error from error
