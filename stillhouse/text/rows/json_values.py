"""JSON: a value a line, or one array, or indented objects one after the other.

Which of them is recognised by the beginning. Memory holds a line or an object.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any, cast

from stillhouse.errors import BadFileError
from stillhouse.text.rows.record import READ_BYTES, Record, Wanted, object_record, object_records

_BLANK = b" \t\r\n" + codecs.BOM_UTF8
_BYTES_PER_CHAR = 12  # two \uXXXX escapes, a surrogate pair, make one character


def read(stream: IO[bytes], wanted: Wanted) -> Iterator[Record]:
    """The values of an array, of indented objects, or of lines; blank lines have numbers too."""
    limit = wanted.max_chars * _BYTES_PER_CHAR + READ_BYTES
    if _is_array(stream):
        return object_records(_json_values(stream, b"", limit, is_array=True), wanted)
    head: list[bytes] = []
    while sum(map(_is_filled, head)) < 2 and (line := stream.readline(limit)):
        head.append(line)
        if not line.endswith(b"\n"):
            break
    first, *others = [line for line in head if _is_filled(line)] or [b""]
    goes_on = others and not others[0].lstrip().startswith((b"{", b"["))
    if goes_on and first.lstrip(_BLANK).startswith(b"{") and not _is_json(first):
        values = _json_values(stream, b"".join(head), limit, is_array=False)
        return object_records(values, wanted)
    return _lines(stream, head, limit, wanted)


def _is_filled(line: bytes) -> bool:
    return bool(line.strip(_BLANK))


def _is_array(stream: IO[bytes]) -> bool:
    """Whether a file is an array, and not lines the first of which is one."""
    head = cast(io.BufferedReader, stream).peek(READ_BYTES).lstrip(_BLANK)
    line, _, rest = head.partition(b"\n")
    return head.startswith(b"[") and not (rest.strip() and _is_json(line))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.strip(_BLANK))
    except (ValueError, RecursionError):
        return False
    return True


def _lines(stream: IO[bytes], head: list[bytes], limit: int, wanted: Wanted) -> Iterator[Record]:
    lines = chain(head, iter(lambda: stream.readline(limit), b""))
    row = -1
    while row < wanted.last and (line := next(lines, b"")):
        row += 1
        if len(line) >= limit and not line.endswith(b"\n"):
            while (rest := stream.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
        if wanted.overlaps(row, row + 1) and _is_filled(line):
            yield _line_record(row, line, limit)


def _line_record(row: int, line: bytes, limit: int) -> Record:
    if len(line) >= limit:
        return Record(row, broken=f"line longer than {limit} bytes (`max_chars`)", raw=line)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(row, broken="invalid UTF-8", raw=line)
    except (ValueError, RecursionError) as error:
        if line.rstrip().endswith(b"},"):  # an array that lost its brackets
            return _line_record(row, line.rstrip()[:-1], limit)
        return Record(row, broken=f"broken JSON: {error}", raw=line)
    return object_record(row, value, line)


_BETWEEN = re.compile(r"[\s,]*")
_UNFINISHED_CHARS = 16  # how far before the end an escape or literal that is cut off begins


def _json_values(stream: IO[bytes], head: bytes, limit: int, *, is_array: bool) -> Iterator[Any]:
    """The values of one array, or values one after the other, whatever their line breaks.

    Raises:
        BadFileError: JSON that is broken or ends too early.
    """
    decode = json.JSONDecoder().raw_decode
    to_text = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, at, row, ended = to_text.decode(head).removeprefix("\ufeff"), 0, 0, False
    begun = not is_array
    while True:
        at = cast(re.Match[str], _BETWEEN.match(text, at)).end()
        if not begun and text[at : at + 1] == "[":
            begun, at = True, at + 1
            continue
        if is_array and text[at : at + 1] == "]":
            if text[at + 1 :].strip() or stream.read().strip():
                raise BadFileError("there is more behind its JSON array: write a value a line")
            return
        try:
            value, end = decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            if ended and at == len(text) and not is_array:
                return
            if ended or not _may_go_on(error, len(text)) or len(text) - at > limit:
                raise BadFileError(f"broken JSON in row {row}: {error}") from error
        else:
            if end < len(text) or ended:
                yield value
                at, row = end, row + 1
                continue
        data = stream.read(max(READ_BYTES, len(text) - at))
        text, at, ended = text[at:] + to_text.decode(data, final=not data), 0, not data
        text = text.removeprefix("\ufeff") if not row and not begun else text


def _may_go_on(error: Exception, end: int) -> bool:
    """Whether JSON may be broken only because the rest has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= end - _UNFINISHED_CHARS
