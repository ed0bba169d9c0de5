"""A user's own scorer: a class that a spec names, fitted once, and loaded in every worker.

A spec says `scorer: {import: "my_pkg.module:MyScorer"}`. The class has the three methods of
`OwnScorer`: it gets texts and returns numbers. Its code is found without running it, identified by
its content, and sent to the workers as it is: they import it from what was sent and from nowhere
else, and it is never read from the store. What it learned is kept in the store as plain arrays.
"""

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.errors import ScorerError, SpecError
from stillhouse.fingerprint import fingerprint, sha256
from stillhouse.own_code import OURS, find_class, find_module, is_installed, top_names, top_of
from stillhouse.selection.scorers import (
    Arrays,
    FitTask,
    TextScorer,
    document_tokens,
    piece_scores,
    plain_scores,
)
from stillhouse.storage.artifact import PartRef, Store
from stillhouse.text.pieces import Grain, read_pieces, token_ids
from stillhouse.text.tokenizer import Tokenizer

_BATCH = 1024


class OwnScorer(Protocol):
    """The methods of a scorer; it is made as `MyScorer(**scorer.settings)`."""

    def fit(self, target: Iterable[str], pool: Iterable[str]) -> Mapping[str, NDArray[Any]]:
        """Learn from texts, once a job.

        Args:
            target: the target's documents, without the held-out ones.
            pool: texts of random sequences of the pool, about `scorer.num_tokens` tokens.

        Returns:
            All that `load` needs, as named arrays of numbers; they are kept in the store.
        """
        ...

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore what `fit` returned; called once in every worker, on a new object."""
        ...

    def score(self, texts: list[str]) -> NDArray[Any]:
        """Values [n] of n texts, larger is better; NaN excludes a text.

        A text's value must not depend on the other texts of the list.
        """
        ...


@dataclass(frozen=True, slots=True)
class OwnCode:
    """A user's code: `module:Class` as in the spec, and the sources by path, sorted."""

    name: str
    files: tuple[tuple[str, bytes], ...]

    def identity(self) -> str:
        return self.digest

    @property
    def digest(self) -> str:
        return fingerprint([self.name, [[path, sha256(data)] for path, data in self.files]])

    def build(self, settings: Mapping[str, Any]) -> Any:
        """Import the class from these files alone, and instantiate it.

        Raises:
            ScorerError: whatever the code raised.
        """
        module, _, name = self.name.partition(":")
        try:
            return getattr(import_code(self, module), name)(**settings)
        except Exception as error:
            raise failed_in(self, "cannot be made", error) from error


class _Finder(MetaPathFinder, InspectLoader):
    """Imports modules from an `OwnCode`, without writing them to disk."""

    def __init__(self, code: OwnCode) -> None:
        self.code = code
        self._sources = {path: data.decode() for path, data in code.files}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._file(fullname) is None:
            return None
        return spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return any(path.startswith(_folder(fullname)) for path in self._sources)

    def get_source(self, fullname: str) -> str:
        return self._sources.get(self._file(fullname) or "", "")  # a folder may lack __init__.py

    def _file(self, fullname: str) -> str | None:
        if self.is_package(fullname):
            return f"{_folder(fullname)}__init__.py"
        path = f"{_folder(fullname)[:-1]}.py"
        return path if path in self._sources else None


def _folder(fullname: str) -> str:
    return fullname.replace(".", "/") + "/"


def import_code(code: OwnCode, module: str) -> ModuleType:
    """Import a module of `code`, even if another version of it was imported before."""
    first = sys.meta_path[0]
    if not isinstance(first, _Finder) or first.code != code:
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        sys.meta_path.insert(0, _Finder(code))
        top = module.partition(".")[0]
        for name in [n for n in sys.modules if n == top or n.startswith(f"{top}.")]:
            del sys.modules[name]
    return importlib.import_module(module)


def find_named(place: str, name: str) -> OwnCode | None:
    """Find the user's code of `module:name`, without running it.

    None if it belongs to Stillhouse or an installed package, which workers import themselves.

    Args:
        place: key and value in the spec, for messages.
        name: as in the spec.

    Raises:
        SpecError: no such module, no such name in it, or too much code.
    """
    if top_of(name) in OURS or is_installed(name):
        return None
    found, wanted = find_module(place, name), name.partition(":")[2]
    if not {wanted, "*"} & top_names(found.tree):
        raise SpecError(f"`{place}`: no `{wanted}` in {found.module}")
    return OwnCode(name, found.files)


def find_code(name: str) -> OwnCode:
    """Find and check the code of a scorer `module:Class`, without running it.

    A top-level module is sent alone; of a package all Python files are sent.

    Raises:
        SpecError: no such module or class, a class without the three methods, too much code.
    """
    found, _ = find_class(f"scorer.import: {name}", name, ("fit", "load", "score"))
    return OwnCode(name, found.files)


def fit(
    code: OwnCode, scorer: OwnScorer, target: Iterable[str], pool: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """What the scorer learns, checked to be plain arrays.

    Raises:
        ScorerError: whatever the code raised, or a result that is not named arrays of numbers.
    """
    try:
        state = dict(scorer.fit(target, pool))
    except Exception as error:
        raise failed_in(code, "failed in `fit`", error) from error
    for key, value in state.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ScorerError(
                f"scorer {code.name}: `fit` returned {key!r} as {type(value).__name__}: return a "
                "mapping of names to arrays of numbers"
            )
    return {str(key): np.ascontiguousarray(value) for key, value in state.items()}


@dataclass(frozen=True)
class OwnFitTask(FitTask):
    """Fit a user's scorer on the target's documents and `num_rows` random sequences."""

    code: OwnCode
    settings: dict[str, Any]
    pip: tuple[str, ...]
    pool: tuple[PartRef, ...]
    num_rows: int

    def fit(self, store: Store) -> Arrays:
        pool = self.sampled_texts(store, self.pool, self.num_rows)
        return fit(self.code, self.code.build(self.settings), self.texts(), pool)


class OwnTokenScorer(TextScorer):
    """A user's scorer over token parts: it gets the texts of sequences, or of whole documents.

    Args:
        arrays: what `fit` returned.
        grain: what the selection chooses.

    Raises:
        ScorerError: whatever the code raised, or a result that is not one number for each text.
    """

    def __init__(
        self,
        arrays: Arrays,
        tokenizer: Tokenizer,
        code: OwnCode,
        settings: Mapping[str, Any],
        grain: Grain,
    ) -> None:
        super().__init__(arrays, tokenizer)
        self._code, self._grain = code, grain
        self._scorer = code.build(settings)
        try:
            self._scorer.load(arrays)
        except Exception as error:
            raise failed_in(code, "failed in `load`", error) from error

    def score(self, tokens: pa.Table) -> pa.Table:
        """One value a sequence; for documents, each document's value at all of its pieces."""
        ids = token_ids(tokens)
        if self._grain == "sequences":
            return plain_scores(self._values([self.tokenizer.decode(row) for row in ids]))
        pieces = read_pieces(tokens)
        documents = list(document_tokens(ids, pieces))
        values = self._values([self.tokenizer.decode(own_ids) for _, _, own_ids in documents])
        by_piece = np.repeat(values, [last - first for first, last, _ in documents])
        sums = (by_piece * pieces.num_tokens).astype(np.float32)
        weights = np.bincount(pieces.sequence, pieces.num_tokens, len(ids))
        means = np.bincount(pieces.sequence, sums, len(ids)) / np.maximum(weights, 1)
        return piece_scores(means.astype(np.float32), pieces, sums, pieces.num_tokens)

    def _values(self, texts: list[str]) -> NDArray[np.float32]:
        batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        return np.concatenate([np.zeros(0, np.float32), *map(self._batch, batches)])

    def _batch(self, texts: list[str]) -> NDArray[np.float32]:
        try:
            values = np.asarray(self._scorer.score(texts), np.float32)
        except Exception as error:
            raise failed_in(self._code, "failed in `score`", error) from error
        if values.shape != (len(texts),):
            raise ScorerError(
                f"scorer {self._code.name}: `score` returned shape {values.shape} for "
                f"{len(texts)} texts: return one number for each"
            )
        return values


def failed_in(code: OwnCode, what: str, error: Exception) -> ScorerError:
    """The user's exception, with the last line of the user's code in its traceback."""
    place, files, trace = "", {path for path, _ in code.files}, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        path = f"{_folder(str(module))[:-1]}.py"
        if path in files or f"{_folder(str(module))}__init__.py" in files:
            place = f" ({path}:{trace.tb_lineno})"
        trace = trace.tb_next
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return ScorerError(f"{code.name} {what}: {type(error).__name__}: {first}{place}")
