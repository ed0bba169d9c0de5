"""Values of Arrow columns and JSON records: by dotted path, as text, as labels.

The path `a.b` is the key `a.b`, or else the key `b` of the object `a`.
"""

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from math import isnan
from typing import Any, cast
from uuid import UUID

import pyarrow as pa

_WHOLE_FLOATS = 2.0**53


class _Absent:
    """The value of a path that does not exist, as opposed to null."""


ABSENT = _Absent()


def find(record: object, path: str) -> Any:
    """The value at a dotted path of a record; ABSENT where there is no such key."""
    if not isinstance(record, dict):
        return ABSENT
    found: dict[str, Any] = record  # pyright: ignore[reportUnknownVariableType]
    if path in found:
        return found[path]
    for head, tail in _cuts(path):
        if head in found:
            return find(found[head], tail)
    return ABSENT


def column_of(schema: pa.Schema, path: str) -> str | None:
    """The column of a schema that holds a dotted path; None where there is none."""
    if path in schema.names:
        return path
    for head, tail in _cuts(path):
        if head in schema.names and _holds(schema.field(head).type, tail):
            return head
    return None


def column_paths(schema: pa.Schema) -> list[str]:
    """The columns of a schema, structs as the paths of what they hold."""
    return [path for field in schema for path in _field_paths(field)]


def _field_paths(field: pa.Field) -> list[str]:
    if not pa.types.is_struct(field.type):
        return [field.name]
    inner: list[pa.Field] = list(cast(pa.StructType, field.type))
    return [f"{field.name}.{path}" for one in inner for path in _field_paths(one)]


def key_paths(record: dict[str, Any]) -> list[str]:
    """The keys of a record, objects as the paths of what they hold."""
    found: list[str] = []
    for key, value in record.items():
        inner = key_paths(cast(dict[str, Any], value)) if isinstance(value, dict) else []
        found += [f"{key}.{path}" for path in inner] or [key]
    return found


def _cuts(path: str) -> list[tuple[str, str]]:
    """Head and tail at each dot, the longest head first."""
    keys = path.split(".")
    return [(".".join(keys[:i]), ".".join(keys[i:])) for i in range(len(keys) - 1, 0, -1)]


def _holds(kind: pa.DataType, path: str) -> bool:
    if not pa.types.is_struct(kind):
        return False
    return column_of(pa.schema(list(cast(pa.StructType, kind))), path) is not None


def plain_values(column: pa.Array) -> list[Any]:
    """Python values; strings that are not UTF-8 as bytes, dates out of range as numbers."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(scalar.type):
            return _value(scalar.value)
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b"\xff"
    except (ValueError, OverflowError):
        return scalar.value


def as_text(value: Any) -> Any:
    """Bytes as text if they are UTF-8 (a Parquet column without a string type)."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell but UTF-8 cannot hold."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def text_fault(name: str, value: Any) -> str | None:
    """Why a value cannot be used as text; None if it can."""
    if isinstance(value, bytes):
        return "invalid UTF-8"
    if isinstance(value, dict):
        keys = ", ".join(map(str, cast(dict[str, Any], value)))
        return f"{name} is not a string but an object; name a key of it as `a.b`: {keys[:200]}"
    if not isinstance(value, str):
        return f"{name} is not a string but {type(value).__name__}"
    return None if is_unicode(value) else "invalid Unicode (lone surrogate)"


def label(value: Any) -> str:
    """A scalar as a label; "" for null. Whole floats are written as integers.

    Raises:
        ValueError: a list or an object, or text that is not Unicode.
    """
    if isinstance(value, bytes):
        value = as_text(value)
    if isinstance(value, str):
        if not is_unicode(value):
            raise ValueError("not Unicode (lone surrogate)")
        return value
    if value is None or value is ABSENT or (isinstance(value, float) and isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE_FLOATS:
        return str(int(value))
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, int | float | Decimal | UUID | timedelta):
        return str(value)
    raise ValueError(f"no plain value but {type(value).__name__}")
