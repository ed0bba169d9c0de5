"""What a file is: its format, and its bytes without compression and in UTF-8.

The suffix says which format a file claims; its first bytes say what it is. A compression or an
encoding is taken off wherever it is found, whatever the file is called. Files of formats that
nothing here reads are refused by name: each would otherwise be a bad row a line.
"""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa

from stillhouse.errors import BadFileError, InputError

Format = Literal["parquet", "jsonl", "text"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
READ_BYTES = 1 << 20
_HEAD_BYTES = 512
_GZIP_BYTES = 1 << 18
_PARQUET = b"PAR1"


def _gunzip(stream: IO[bytes]) -> Iterator[bytes]:
    """All members of a gzip stream; zeros behind the last one are padding."""
    data, at = stream.read(_GZIP_BYTES), 0
    while data:
        if not data.startswith(b"\x1f\x8b"[: len(data)]):
            raise BadFileError(f"behind its last gzip member, from byte {at} on, it is no gzip")
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            found = member.decompress(data, READ_BYTES)
            at += len(data) - len(member.unused_data) - len(member.unconsumed_tail)
            data = member.unused_data or member.unconsumed_tail or stream.read(_GZIP_BYTES)
            if not (found or data or member.eof):
                raise EOFError("cut off: it ends in the middle of its gzip data")
            yield found
        while data and not data.strip(b"\0"):
            at, data = at + len(data), stream.read(_GZIP_BYTES)
        at, data = at + len(data) - len(data.lstrip(b"\0")), data.lstrip(b"\0")


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


_Reader = Callable[[IO[bytes]], Any]
_COMPRESSIONS: dict[str, tuple[str, re.Pattern[bytes], _Reader]] = {
    ".gz": ("gzip", re.compile(rb"\x1f\x8b\x08"), lambda raw: _Chunks(_gunzip(raw))),
    ".zst": (  # Arrow's reader, because it notices a truncated stream
        "zstd",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"),
    ),
    ".bz2": ("bzip2", re.compile(rb"BZh[1-9]1AY&SY"), bz2.BZ2File),
    ".xz": ("xz", re.compile(rb"\xfd7zXZ\x00"), lzma.LZMAFile),
}
"""By suffix: name, first bytes, reader."""
_ENCODINGS = (
    ("utf-32", re.compile(rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff")),
    ("utf-16", re.compile(rb"\xff\xfe|\xfe\xff")),
    ("utf-16-le", re.compile(rb"[^\x00]\x00[^\x00]\x00")),
    ("utf-16-be", re.compile(rb"\x00[^\x00]\x00[^\x00]")),
)
_NOT_READ = {
    "a zip archive: unpack it": re.compile(rb"PK\x03\x04"),
    "a tar archive: unpack it": re.compile(rb".{257}ustar", re.DOTALL),
    "an Arrow file: write it as Parquet": re.compile(rb"ARROW1"),
    "an Avro file: write it as Parquet": re.compile(rb"Obj\x01"),
    "a PDF: extract its text": re.compile(rb"%PDF-"),
    "a Git LFS pointer: fetch the file itself (`git lfs pull`)": re.compile(
        rb"version https://git-lfs"
    ),
}
_NO_JSON = {
    "an HTML page: something answered with a page instead of the file": re.compile(
        rb"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE
    ),
    "an ORC file: write it as Parquet": re.compile(rb"ORC"),
    "an XML document": re.compile(rb"\s*<\?xml\b"),
}


def listed_suffixes(*wanted: Format) -> tuple[str, ...]:
    """The suffixes of the files of some formats that a folder is read for.

    A plain `.json` beside data is mostly about them; it is read where a path or glob names it.
    """
    suffixes = [name for name, kind in SUFFIXES.items() if kind in wanted]
    listed = [s + c for s in suffixes for c in ("", *_COMPRESSIONS)]
    return tuple(suffix for suffix in listed if suffix != ".json")


def format_of(uri: str, given: Format | Literal["auto"]) -> Format:
    """The format of a file, as given or else by its suffix (in any case).

    Raises:
        InputError: a suffix that says nothing, under `auto`.
    """
    if given != "auto":
        return given
    name = _file_name(uri)
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    raise InputError(f"{uri}: unknown suffix; known are {', '.join(SUFFIXES)}; or set `format`")


def _file_name(uri: str) -> str:
    """In lower case; what stands behind `?` in a web address is not the file's name."""
    is_web = uri.startswith(("http://", "https://"))
    return (urlsplit(uri).path if is_web else uri).lower()


def decoded(uri: str, stream: IO[bytes], kind: Format) -> tuple[Format, IO[bytes]]:
    """What a file holds, with compression and encoding taken off.

    Returns:
        Its format, which is Parquet where the file is, whatever it claims; a stream of UTF-8, or
        for Parquet the file itself.

    Raises:
        BadFileError: a format that nothing here reads, or not the compression of the suffix.
    """
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    if head.startswith(_PARQUET):
        return "parquet", stream
    stream, head, inside = _decompressed(uri, stream, head)
    if kind == "parquet" or head.startswith(_PARQUET):
        raise BadFileError(_not_parquet(head, inside))
    refused = _NOT_READ | (_NO_JSON if kind == "jsonl" else {})
    found = next((name for name, start in refused.items() if start.match(head)), None)
    if found is not None:
        raise BadFileError(f"it is {found}")
    encoding = next((name for name, start in _ENCODINGS if start.match(head)), None)
    if encoding is None:
        return kind, stream
    return kind, io.BufferedReader(_Chunks(_recoded(stream, encoding)), READ_BYTES)


def _decompressed(uri: str, stream: IO[bytes], head: bytes) -> tuple[IO[bytes], bytes, str | None]:
    """The stream, its first bytes, and the name of the compression that was taken off."""
    for name, start, reader in _COMPRESSIONS.values():
        if start.match(head):
            found = io.BufferedReader(reader(stream), READ_BYTES)
            return found, found.peek(_HEAD_BYTES)[:_HEAD_BYTES], name
    for suffix, (name, _, _) in _COMPRESSIONS.items():
        if head and _file_name(uri).endswith(suffix):
            raise BadFileError(f"its suffix says {name}, but it is not")
    return stream, head, None


def _not_parquet(head: bytes, inside: str | None) -> str:
    if inside is not None:
        return f"Parquet cannot be read inside {inside}: decompress the file"
    return f"it is not Parquet: it begins with {head[:16]!r}" if head else "it has no bytes"


def _recoded(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    """UTF-8; halves of pairs pass, so that they cost a row and not the file."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    while data := stream.read(READ_BYTES):
        yield decoder.decode(data).encode("utf-8", "surrogatepass")
    decoder.decode(b"", final=True)


@contextmanager
def naming_bad_file(uri: str) -> Generator[None]:
    """Errors of parsers and decompressors become BadFileError; those of storage pass."""
    try:
        yield
    except (
        BadFileError,
        EOFError,
        UnicodeDecodeError,
        lzma.LZMAError,
        pa.ArrowException,
        zlib.error,
    ) as error:
        raise _bad_file(uri, error) from error
    except OSError as error:
        if error.errno is not None:  # the operating system or the store speaks, not a parser
            raise
        raise _bad_file(uri, error) from error


def _bad_file(uri: str, error: Exception) -> BadFileError:
    cause = (str(error) or type(error).__name__).splitlines()[0][:200]
    if "too much memory" in cause:
        cause += " (its window is above 128 MB: compress it without `--long`)"
    return BadFileError(f"{uri}: cannot be read: {cause}")
