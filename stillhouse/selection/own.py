"""Scorers of others: a class that a spec names, fitted once, loaded in every worker, asked there.

A spec says `scorer: {import: "my_pkg.module:MyScorer"}`. The class has three methods, those of
`OwnScorer`; it sees texts and gives numbers. Its code is found here, named by its content, and
carried to the workers as it is: no worker imports anything else by that name, and nothing of it is
ever read from the store. What it learned is kept in the store as plain arrays.
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
    SCORES_SCHEMA,
    TextScorer,
    document_tokens,
    plain_scores,
)
from stillhouse.text.pieces import read_pieces, token_ids
from stillhouse.text.tokenizer import Tokenizer

METHODS = ("fit", "load", "score")
_BATCH = 1024


class OwnScorer(Protocol):
    """What a class has to have to be a scorer; it is made as `MyScorer(**scorer.settings)`."""

    def fit(self, target: Iterable[str], pool: Iterable[str]) -> Mapping[str, NDArray[Any]]:
        """Learn from texts, once a job.

        Args:
            target: the target's documents, without the held-out ones.
            pool: texts of random sequences of the pool, about `scorer.num_tokens` tokens.

        Returns:
            All that `load` needs, as named arrays; they are kept in the store.
        """
        ...

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `fit` returned; called once in every worker, on a fresh object."""
        ...

    def score(self, texts: list[str]) -> NDArray[Any]:
        """Values [n] of n texts, larger is better; the same for a text whatever stands beside it.

        NaN leaves a text out.
        """
        ...


@dataclass(frozen=True, slots=True)
class OwnCode:
    """Code of a user's class: `name` as in the spec, `files` the sources by path, sorted."""

    name: str
    files: tuple[tuple[str, bytes], ...]

    def identity(self) -> str:
        """The digest."""
        return self.digest

    @property
    def digest(self) -> str:
        """The identity: name and content of every file."""
        return fingerprint([self.name, [[path, sha256(data)] for path, data in self.files]])

    def build(self, settings: Mapping[str, Any]) -> Any:
        """Import the class from these files alone, and make an object of it.

        Raises:
            ScorerError: whatever the code raised.
        """
        module, _, name = self.name.partition(":")
        try:
            return getattr(import_code(self, module), name)(**settings)
        except Exception as error:
            raise failed_in(self, "cannot be made", error) from error


class _Finder(MetaPathFinder, InspectLoader):
    """Imports from an `OwnCode`; nothing is written to a disk."""

    def __init__(self, code: OwnCode) -> None:
        self.code = code
        self._sources = {path: data.decode() for path, data in code.files}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module among the files, or None for all others."""
        if self._file(fullname) is None:
            return None
        return spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether files lie below it."""
        return any(path.startswith(_folder(fullname)) for path in self._sources)

    def get_source(self, fullname: str) -> str:
        """Its text; of a folder without `__init__.py`, nothing."""
        return self._sources.get(self._file(fullname) or "", "")

    def _file(self, fullname: str) -> str | None:
        if self.is_package(fullname):
            return f"{_folder(fullname)}__init__.py"
        path = f"{_folder(fullname)[:-1]}.py"
        return path if path in self._sources else None


def _folder(fullname: str) -> str:
    return fullname.replace(".", "/") + "/"


def import_code(code: OwnCode, module: str) -> ModuleType:
    """The module as `code` has it, also where another version of it was imported before."""
    first = sys.meta_path[0]
    if not isinstance(first, _Finder) or first.code != code:
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        sys.meta_path.insert(0, _Finder(code))
        top = module.partition(".")[0]
        for name in [n for n in sys.modules if n == top or n.startswith(f"{top}.")]:
            del sys.modules[name]
    return importlib.import_module(module)


def find_named(place: str, name: str) -> OwnCode | None:
    """The code of `module:name` in a folder of the user's, found without running it; None where it
    is ours or of an installed package, which workers import themselves.

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


def find_code(name: str, folders: Sequence[str] | None = None) -> OwnCode:
    """Find and check the code of `module:Class` without running it.

    A module at the top is sent alone, of a package all Python files.

    Args:
        name: as in the spec.
        folders: where to look; default the working directory, then Python's path.

    Raises:
        SpecError: no such module or class, a class without the three methods, too much code.
    """
    found, _ = find_class(f"scorer.import: {name}", name, METHODS, folders)
    return OwnCode(name, found.files)


def fit(
    code: OwnCode, scorer: OwnScorer, target: Iterable[str], pool: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """What the scorer learns, checked to be plain arrays.

    Raises:
        ScorerError: whatever the code raised, or something else than named arrays of numbers.
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


class OwnTokenScorer(TextScorer):
    """A user's scorer over token parts: texts of sequences, or of whole documents.

    `state` is what `fit` returned, `grain` what the selection chooses.

    Raises:
        ScorerError: whatever the code raised, or not one number for each text.
    """

    def __init__(
        self,
        code: OwnCode,
        settings: Mapping[str, Any],
        state: Mapping[str, NDArray[Any]],
        tokenizer: Tokenizer,
        grain: str,
    ) -> None:
        self._code, self._tokenizer, self._grain = code, tokenizer, grain
        self._scorer = code.build(settings)
        try:
            self._scorer.load(state)
        except Exception as error:
            raise failed_in(code, "failed in `load`", error) from error

    def score(self, tokens: pa.Table) -> pa.Table:
        """One value a sequence; for documents one for each, at all of its pieces."""
        ids = token_ids(tokens)
        if self._grain == "sequences":
            return plain_scores(self._values([self._tokenizer.decode(row) for row in ids]))
        pieces = read_pieces(tokens)
        found = list(document_tokens(ids, pieces))
        values = self._values([self._tokenizer.decode(owned) for _, _, owned in found])
        by_piece = np.repeat(values, [last - first for first, last, _ in found])
        sums = (by_piece * pieces.num_tokens).astype(np.float32)
        weights = np.bincount(pieces.sequence, pieces.num_tokens, len(ids))
        means = np.bincount(pieces.sequence, sums, len(ids)) / np.maximum(weights, 1)
        offsets = pa.array(pieces.offsets, pa.int32())
        return pa.Table.from_arrays(
            [
                pa.array(means.astype(np.float32)),
                pa.ListArray.from_arrays(offsets, pa.array(sums)),
                pa.ListArray.from_arrays(offsets, pa.array(pieces.num_tokens.astype(np.int32))),
            ],
            schema=SCORES_SCHEMA,
        )

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
    """The user's exception with the last line of the user's code that it came through."""
    place, files, trace = "", {path for path, _ in code.files}, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        path = f"{_folder(str(module))[:-1]}.py"
        if path in files or f"{_folder(str(module))}__init__.py" in files:
            place = f" ({path}:{trace.tb_lineno})"
        trace = trace.tb_next
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return ScorerError(f"{code.name} {what}: {type(error).__name__}: {first}{place}")
