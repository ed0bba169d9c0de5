"""The content of a file, decompressed and in UTF-8.

The suffix tells the format that a file should have; Parquet, Arrow, compression and encoding are
recognised by its first bytes, whatever its name. Files of other formats are refused by name,
because otherwise each of their lines would be a bad row.
"""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from stillhouse.errors import BadFileError
from stillhouse.text.formats import FORMATS, lower_name
from stillhouse.text.rows.record import READ_BYTES

_HEAD_BYTES = 512
_GZIP_BYTES = 1 << 18
FILE_ERRORS = (EOFError, UnicodeDecodeError, lzma.LZMAError, pa.ArrowException, zlib.error)
"""What parsers and decompressors raise for a broken file."""
_FILES = {
    "parquet": ("Parquet", re.compile(rb"PAR1")),
    "arrow": ("Arrow", re.compile(rb"ARROW1|\xff\xff\xff\xff[^\xff]")),  # a file, or a stream
}
"""Formats that are known by their first bytes, whatever the suffix."""


def _gunzip(stream: IO[bytes]) -> Iterator[bytes]:
    """All members of a gzip stream; zeros after the last one are padding."""
    data, at = stream.read(_GZIP_BYTES), 0
    while data:
        if not data.startswith(b"\x1f\x8b"[: len(data)]):
            raise BadFileError(f"behind its last gzip member, from byte {at} on, it is no gzip")
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        while not member.eof:
            chunk = member.decompress(data, READ_BYTES)
            at += len(data) - len(member.unused_data) - len(member.unconsumed_tail)
            data = member.unused_data or member.unconsumed_tail or stream.read(_GZIP_BYTES)
            if not (chunk or data or member.eof):
                raise EOFError("cut off: it ends in the middle of its gzip data")
            yield chunk
        while data and not data.strip(b"\0"):
            at, data = at + len(data), stream.read(_GZIP_BYTES)
        at, data = at + len(data) - len(data.lstrip(b"\0")), data.lstrip(b"\0")


class _Chunks(io.RawIOBase):
    """An iterator of bytes as a file."""

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
    ".zst": (  # by Arrow, which notices a truncated stream
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
    "a Feather file of version 1: write it again": re.compile(rb"FEA1"),
    "an Avro file: write it as Parquet": re.compile(rb"Obj\x01"),
    "a PDF: extract its text": re.compile(rb"%PDF-"),
    "a Git LFS pointer: fetch the file itself (`git lfs pull`)": re.compile(
        rb"version https://git-lfs"
    ),
}
_NO_ROWS = {
    "an HTML page: something answered with a page instead of the file": re.compile(
        rb"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE
    ),
    "an ORC file: write it as Parquet": re.compile(rb"ORC"),
    "an XML document": re.compile(rb"\s*<\?xml\b"),
}


def decoded(uri: str, stream: IO[bytes], kind: str) -> tuple[str, IO[bytes]]:
    """Decompress and decode a file.

    Returns:
        Its format, which is Parquet or Arrow if the file is, whatever `kind`; and its content, as
        that format's reader wants it.

    Raises:
        BadFileError: an unknown format, or not the compression of the suffix.
    """
    if FORMATS[kind].content == "opened":
        return kind, stream
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    found = _file_format(head)
    if found is not None:
        return found, stream
    stream, head, compression = _decompressed(uri, stream, head)
    found = _file_format(head) or kind
    if found in _FILES:
        title = _FILES[found][0]
        if compression is not None:
            raise BadFileError(f"{title} cannot be read inside {compression}: decompress the file")
        _refuse(head, {name: start for name, start in _NOT_READ.items() if "Feather" in name})
        begins = f"it is not {title}: it begins with {head[:16]!r}"
        raise BadFileError(begins if head else "it has no bytes")
    if FORMATS[kind].content == "bytes":
        return kind, stream
    _refuse(head, _NOT_READ | ({} if kind == "text" else _NO_ROWS))
    encoding = next((name for name, start in _ENCODINGS if start.match(head)), None)
    if encoding is None:
        return kind, stream
    return kind, io.BufferedReader(_Chunks(_recoded(stream, encoding)), READ_BYTES)


def _file_format(head: bytes) -> str | None:
    return next((kind for kind, (_, start) in _FILES.items() if start.match(head)), None)


def _refuse(head: bytes, refused: dict[str, re.Pattern[bytes]]) -> None:
    found = next((name for name, start in refused.items() if start.match(head)), None)
    if found is not None:
        raise BadFileError(f"it is {found}")


def _decompressed(uri: str, stream: IO[bytes], head: bytes) -> tuple[IO[bytes], bytes, str | None]:
    """The decompressed stream, its first bytes, and the name of the compression if there is one."""
    for name, start, reader in _COMPRESSIONS.values():
        if start.match(head):
            plain = io.BufferedReader(reader(stream), READ_BYTES)
            return plain, plain.peek(_HEAD_BYTES)[:_HEAD_BYTES], name
    for suffix, (name, _, _) in _COMPRESSIONS.items():
        if head and lower_name(uri).endswith(suffix):
            raise BadFileError(f"its suffix says {name}, but it is not")
    return stream, head, None


def _recoded(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    """The text as UTF-8; lone surrogates pass, so that they make a bad row and not a bad file."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    while data := stream.read(READ_BYTES):
        yield decoder.decode(data).encode("utf-8", "surrogatepass")
    decoder.decode(b"", final=True)


@contextmanager
def naming_bad_file(uri: str) -> Generator[None]:
    """Turn errors of parsers and decompressors into BadFileError; those of storage pass."""
    try:
        yield
    except (BadFileError, *FILE_ERRORS) as error:
        raise _bad_file(uri, error) from error
    except OSError as error:
        if error.errno is not None:  # of the operating system or the store, not of a parser
            raise
        raise _bad_file(uri, error) from error


def _bad_file(uri: str, error: Exception) -> BadFileError:
    cause = (str(error) or type(error).__name__).splitlines()[0][:200]
    if "too much memory" in cause:
        cause += " (its window is above 128 MB: compress it without `--long`)"
    return BadFileError(f"{uri}: cannot be read: {cause}")
