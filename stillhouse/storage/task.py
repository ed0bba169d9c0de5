"""Tasks: units of work that are named by everything their result depends on.

A task is a frozen dataclass. Its fields are its identity, except those of type `Place[...]`: where
something lies and how wide it runs do not change the name. A worker runs the task, writes its
tables as parts, and records in a receipt that it is finished; a task that has a receipt is never
run again.

    >>> @dataclass(frozen=True)
    ... class Count(Task):
    ...     KIND = "counts"
    ...     texts: tuple[str, ...]
    ...     uri: Place[str] = ""
    >>> Count(("a",)).fingerprint == Count(("a",), uri="elsewhere").fingerprint
    True
    >>> Count(("a",)).fingerprint == Count(("b",)).fingerprint
    False
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property, partial
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa

from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.storage.artifact import Manifest, Part, PartRef, Receipt, Store
from stillhouse.storage.parquet import ROW_GROUP

T = TypeVar("T")
_PLACE = "place"
Place = Annotated[T, _PLACE]
"""The type of a field that is not part of a task's identity."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a task made.

    Attributes:
        tables: written as parts, in order; may be a generator.
        counts: by name; read after the tables are written.
        info: small JSON values.
        named: further tables, by the name of their folder; empty ones are not written.
        parts: that the task wrote itself, after those of `tables`.
        files: that it wrote besides: sha256 by path in the store.
        agrees: whether a part that another worker wrote first, with other bytes, is as good as
            ours (ours, theirs); None to accept any.
    """

    tables: Iterable[pa.Table] = ()
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])
    named: Mapping[str, pa.Table] = field(default_factory=dict[str, pa.Table])
    parts: Sequence[PartRef] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    agrees: Callable[[pa.Table, pa.Table], bool] | None = None


class Task:
    """Work that a pool of workers does; a subclass is a frozen dataclass.

    Attributes:
        KIND: of its parts and receipts; their folder in the store.
        VERSION: raised when the same fields come to mean another result.
        ROW_GROUP: rows of a row group in its parts.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    ROW_GROUP: ClassVar[int] = ROW_GROUP

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([type(self).__name__, self.VERSION, _fields_of(self)])

    def load(self, store: Store) -> Any:
        """Read what `run` will need; called while the worker is busy with another task."""
        return None

    def run(self, store: Store, host: Any, loaded: Any) -> Output:
        """Do the work; `host` is what the worker keeps between tasks, `loaded` what `load`
        returned.
        """
        raise NotImplementedError

    def path(self, number: int) -> str:
        """The path of its part `number` in the store."""
        return f"{self.KIND}/parts/{self.fingerprint}-{number:05d}.parquet"

    def tokens_in(self, table: pa.Table) -> int:
        """Tokens in one of its tables."""
        return 0


def commit(store: Store, task: Task, made: Output) -> Receipt:
    """Write the output of a task, then its receipt."""
    parts: list[PartRef] = []
    for table in made.tables:
        parts.append(
            store.put_part(
                task.path(len(parts)),
                table,
                num_tokens=task.tokens_in(table),
                row_group=task.ROW_GROUP,
                agrees=made.agrees and partial(made.agrees, table),
            )
        )
    files, info = dict(made.files), dict(made.info)
    for name, table in made.named.items():
        if table.num_rows:
            path = f"{task.KIND}/{name}/{task.fingerprint}.parquet"
            files[path] = store.put_part(path, table, num_tokens=0).sha256
            info[name] = path
    counts = dict(sorted(made.counts.items()))
    receipt = Receipt(task.fingerprint, (*parts, *made.parts), counts, info, files)
    return store.put_receipt(task.KIND, receipt)


def identity(value: Any) -> Any:
    """What identifies a value, as JSON.

    Tasks, manifests, receipts and parts are identified by their fingerprints, objects with an
    `identity()` by what it returns, other dataclasses by their fields, settings by their values.

    Raises:
        TypeError: a value of another type.
    """
    match value:
        case None | str() | bool() | int() | float():
            return value
        case Task() | Manifest():
            return value.fingerprint
        case PartRef() | Part():
            return value.sha256
        case Receipt():
            return value.task
        case dict():
            return {str(key): identity(item) for key, item in value.items()}
        case list() | tuple():
            return [identity(item) for item in value]
        case set() | frozenset():
            return sorted(identity(item) for item in value)
        case np.ndarray():
            return [value.dtype.str, list(value.shape), sha256(value.tobytes())]
        case _ if hasattr(value, "identity"):
            return value.identity()
        case _ if is_dataclass(value):
            return _fields_of(value)
        case _ if hasattr(value, "model_dump"):
            return value.model_dump(mode="json")
        case _:
            raise TypeError(f"{type(value).__name__} has no identity")


def _fields_of(value: Any) -> dict[str, Any]:
    places = _places(type(value))
    return {f.name: identity(getattr(value, f.name)) for f in fields(value) if f.name not in places}


@cache
def _places(cls: type) -> frozenset[str]:
    hints = get_type_hints(cls, include_extras=True)
    return frozenset(n for n, hint in hints.items() if _PLACE in getattr(hint, "__metadata__", ()))
