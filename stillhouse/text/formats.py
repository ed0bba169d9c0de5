"""The format of a file, and its content decompressed and in UTF-8.

The suffix tells the format that a file should have; compression and encoding are recognised by its
first bytes, whatever its name. Files of other formats are refused by name, because otherwise each
of their lines would be a bad row.
"""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal, cast
from urllib.parse import urlsplit

import pyarrow as pa

from stillhouse.custom_code import CustomCode
from stillhouse.errors import BadFileError, InputError, SpecError

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
FILE_ERRORS = (EOFError, UnicodeDecodeError, lzma.LZMAError, pa.ArrowException, zlib.error)
"""What parsers and decompressors raise for a broken file."""
_PARQUET = b"PAR1"


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
COMPRESSIONS: dict[str, tuple[str, re.Pattern[bytes], _Reader]] = {
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


def listed_suffixes(*wanted: str | CustomCode) -> tuple[str, ...]:
    """The suffixes of the files that are read in a folder: of some formats, or of a user's reader.

    Without `.json`: beside data such a file is mostly metadata. A path or glob may name it.

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
    suffixes = [name for name, kind in SUFFIXES.items() if kind in wanted]
    listed = [s + c for s in suffixes for c in ("", *COMPRESSIONS)]
    return tuple(suffix for suffix in listed if suffix != ".json")


def format_of(uri: str, given: str) -> Format:
    """The format of a file; for `auto` by its suffix, upper or lower case.

    Raises:
        InputError: an unknown suffix, for `auto`.
    """
    if given != "auto":
        return cast(Format, given)
    name = _lower_name(uri)
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    raise InputError(f"{uri}: unknown suffix; known are {', '.join(SUFFIXES)}; or set `format`")


def _lower_name(uri: str) -> str:
    """Without the query of a web address."""
    is_web = uri.startswith(("http://", "https://"))
    return (urlsplit(uri).path if is_web else uri).lower()


def decoded(uri: str, stream: IO[bytes], kind: Format) -> tuple[Format, IO[bytes]]:
    """Decompress and decode a file.

    Returns:
        Its format, which is Parquet if the file is, whatever `kind`; a stream of UTF-8, or for
        Parquet the file itself.

    Raises:
        BadFileError: an unknown format, or not the compression of the suffix.
    """
    head = stream.read(_HEAD_BYTES)
    stream.seek(0)
    if head.startswith(_PARQUET):
        return "parquet", stream
    stream, head, compression = _decompressed(uri, stream, head)
    if kind == "parquet" or head.startswith(_PARQUET):
        if compression is not None:
            raise BadFileError(f"Parquet cannot be read inside {compression}: decompress the file")
        begins = f"it is not Parquet: it begins with {head[:16]!r}"
        raise BadFileError(begins if head else "it has no bytes")
    refused = _NOT_READ | (_NO_JSON if kind == "jsonl" else {})
    found = next((name for name, start in refused.items() if start.match(head)), None)
    if found is not None:
        raise BadFileError(f"it is {found}")
    encoding = next((name for name, start in _ENCODINGS if start.match(head)), None)
    if encoding is None:
        return kind, stream
    return kind, io.BufferedReader(_Chunks(_recoded(stream, encoding)), READ_BYTES)


def _decompressed(uri: str, stream: IO[bytes], head: bytes) -> tuple[IO[bytes], bytes, str | None]:
    """The decompressed stream, its first bytes, and the name of the compression if there is one."""
    for name, start, reader in COMPRESSIONS.values():
        if start.match(head):
            plain = io.BufferedReader(reader(stream), READ_BYTES)
            return plain, plain.peek(_HEAD_BYTES)[:_HEAD_BYTES], name
    for suffix, (name, _, _) in COMPRESSIONS.items():
        if head and _lower_name(uri).endswith(suffix):
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
