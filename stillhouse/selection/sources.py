"""Which sources are counted one by one: the largest thousand, and those that a quota names.

A source column may hold a label for every document (URLs): all others are counted together, so
that neither memory nor a report grows with their number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAX_SOURCES = 1000
OTHER = "(other)"
"""All sources that are not counted one by one; one of that very name is among them."""
_MOST_LABELS = 100_000
"""Labels whose counts are held at once; beyond, the smallest are forgotten."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources of a pool that are counted one by one, sorted.

    Attributes:
        names: of these.
        others: whether the pool has more.
        num_rows: of each; of one that was forgotten in between some may be missing.
        largest_other: no other source has more rows than this.
    """

    names: tuple[str, ...]
    others: bool = False
    num_rows: tuple[int, ...] = ()
    largest_other: int = 0

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> "Sources":
        """The inverse of `labels`."""
        others = bool(labels) and labels[-1] == OTHER
        return cls(tuple(labels[:-1] if others else labels), others)

    def identity(self) -> list[str]:
        """What decides the codes of rows."""
        return self.labels

    @property
    def labels(self) -> list[str]:
        """What the codes 0, 1, ... stand for."""
        return [*self.names, OTHER] if self.others else list(self.names)

    def codes(self, labels: Sequence[str]) -> NDArray[np.int32]:
        """int32 [n]: the code of each label; those of others share the last one."""
        place = {name: code for code, name in enumerate(self.names)}
        return np.array([place.get(label, len(self.names)) for label in labels], np.int32)


@dataclass(slots=True)
class LabelCounts:
    """Tokens and rows by label, of at most `_MOST_LABELS` labels beside those `named`.

    A label that was forgotten had no more than `forgotten_rows` rows until then.
    """

    named: frozenset[str] = frozenset()
    counts: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    forgotten_rows: int = 0

    def add(self, found: Iterable[tuple[str, int, int]], forgotten_rows: int = 0) -> None:
        """Add (label, tokens, rows), each label once."""
        self.forgotten_rows += forgotten_rows
        for label, tokens, rows in found:
            before = self.counts.get(label, (0, 0))
            self.counts[label] = before[0] + tokens, before[1] + rows
            if len(self.counts) > 2 * _MOST_LABELS + len(self.named):
                self._forget()

    def _forget(self) -> None:
        small = [label for label in self._largest_first()[_MOST_LABELS:] if label not in self.named]
        self.forgotten_rows += max((self.counts.pop(label)[1] for label in small), default=0)

    def _largest_first(self) -> list[str]:
        return sorted(self.counts, key=lambda label: (-self.counts[label][0], label))

    def choose(self) -> Sources:
        """The named ones that occur and the largest, up to `MAX_SOURCES`; ties by label."""
        known = [label for label in self._largest_first() if label != OTHER]
        named = [label for label in known if label in self.named]
        rest = [label for label in known if label not in self.named]
        room = max(0, MAX_SOURCES - len(named))
        chosen = {*named, *rest[:room]}
        left = [rows for label, (_, rows) in self.counts.items() if label not in chosen]
        others = bool(left) or self.forgotten_rows > 0
        largest = max(left, default=0) + self.forgotten_rows
        names = tuple(sorted(chosen))
        return Sources(names, others, tuple(self.counts[name][1] for name in names), largest)
