"""Which files of a Python environment become which source, and how much of each is taken.

The choice is by keyed hashes of paths and by sorted walks, so it is the same whenever the
environment is the same.
"""

import gzip
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import corpus_text

T = TypeVar("T")

# Upper bound of each source as a share of the pool. Docstrings together are about an eighth: what
# a selection with tau = 8 keeps.
SHARES = {
    "python_code": 0.15,
    "test_sources": 0.13,
    "api_descriptions": 0.12,
    "package_docstrings": 0.10,
    "c_headers": 0.09,
    "type_stubs": 0.08,
    "readmes": 0.08,
    "comments": 0.04,
    "config": 0.05,
    "licences": 0.05,
    "cython": 0.04,
    "messages": 0.02,
    "stdlib_docstrings": 0.03,
    "python_reference": 0.03,
    "web": 0.02,
}
MAX_FILE_BYTES = 400_000
MAX_DOCUMENTS_PER_FILE = 8
STDLIB = "stdlib_docstrings"  # the pool's source and the target: other modules

_TEST_DIRS = frozenset({"test", "tests", "testing", "idle_test"})
# `_distutils` is setuptools' copy of a module of the standard library.
_SKIPPED_DIRS = frozenset({"__pycache__", "site-packages", "dist-packages", "sboms", "_distutils"})
_SUFFIX_KINDS = {
    **dict.fromkeys((".h", ".hpp", ".cuh"), "c_headers"),
    **dict.fromkeys((".json", ".toml", ".yaml", ".yml", ".ini", ".cfg"), "config"),
    **dict.fromkeys((".pyx", ".pxd", ".pxi"), "cython"),
    **dict.fromkeys((".js", ".css", ".html"), "web"),
    **dict.fromkeys((".md", ".rst"), "readmes"),
    ".pyi": "type_stubs",
    ".py": "python",
}
_READERS: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(
        ("c_headers", "config", "cython", "web", "type_stubs"), corpus_text.handwritten
    ),
    **dict.fromkeys(("readmes", "licences"), corpus_text.clip),
    "metadata": corpus_text.long_description,
    "api_descriptions": corpus_text.api_descriptions,
    "python_reference": corpus_text.reference_topics,
    "test_sources": lambda text: corpus_text.python_texts(text).code,
}


@dataclass(frozen=True, slots=True)
class Document:
    """One row; `id` is source, path below its root, and number within the file."""

    id: str
    text: str
    source: str


@dataclass(slots=True)
class Budget:
    """Documents of one source: up to `max_bytes` of UTF-8 text, the first few of each file."""

    source: str
    max_bytes: int
    max_per_file: int | None = MAX_DOCUMENTS_PER_FILE
    documents: list[Document] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether the next document would be refused."""
        return self.num_bytes >= self.max_bytes

    def add(self, file: str, texts: list[str]) -> None:
        """Take the file's documents until the budget is used."""
        for number, text in enumerate(texts[: self.max_per_file]):
            if self.full:
                return
            self.documents.append(Document(f"{self.source}/{file}#{number}", text, self.source))
            self.num_bytes += len(text.encode())


def keyed_hash(text: str) -> int:
    """64 bits of BLAKE2b under a key of this builder: the only source of chance here."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"stillhouse demo")
    return int.from_bytes(digest.digest(), "big")


def in_target(file: str) -> bool:
    """Whether a standard-library file belongs to the target: two of three top-level modules.

    `_decimal` and `decimal` go together, so that no module's prose stands on both sides.
    """
    module = file.split("/")[0].removesuffix(".py").removeprefix("_py").lstrip("_")
    return keyed_hash(module) % 3 != 0


def kind_of(file: str) -> str | None:
    """What kind of text a path holds: a source, or `python` or `metadata`; None to leave it."""
    *folders, name = file.split("/")
    is_test = bool(_TEST_DIRS & set(folders)) or name.startswith("test_") or name == "conftest.py"
    if name.endswith(".py") and is_test:
        return "test_sources"
    if "licenses" in folders or name.upper().startswith(("LICENSE", "LICENCE", "COPYING")):
        return None if name.endswith(".py") else "licences"
    if name.startswith("service-") and name.endswith(".json.gz"):
        return "api_descriptions"
    if name == "METADATA" and folders[-1:] and folders[-1].endswith(".dist-info"):
        return "metadata"
    if name.upper() in ("README", "README.TXT"):
        return "readmes"
    return None if is_test else _SUFFIX_KINDS.get(os.path.splitext(name)[1])


def walk(root: Path) -> Iterator[str]:
    """Paths below `root`, with `/`, in sorted order; installed packages are no standard library."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_DIRS)
        for name in sorted(names):
            yield (Path(folder) / name).relative_to(root).as_posix()


def by_turns(files: Iterable[str]) -> list[str]:
    """Files in drawn order, one of each top-level package, then a second of each, and so on.

    A large package then fills only what the small ones leave.
    """
    packages: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for file in files:
        packages[file.split("/")[0]].append((keyed_hash(file), file))
    turns = ((turn, *x) for drawn in packages.values() for turn, x in enumerate(sorted(drawn)))
    return [file for _, _, file in sorted(turns)]


def read_text(path: Path) -> str:
    """The file as UTF-8 without what is not; empty above `MAX_FILE_BYTES` (generated tables)."""
    if path.stat().st_size > MAX_FILE_BYTES and path.parent.name != "pydoc_data":
        return ""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def _by_kind(root: Path) -> dict[str, list[str]]:
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for file in walk(root):
        if kind := kind_of(file):
            kinds[kind].append(file)
    return kinds


class Collector:
    """Fills the budgets from the files of an environment."""

    def __init__(self, pool_bytes: int, target_bytes: int) -> None:
        self.pool = {name: Budget(name, int(share * pool_bytes)) for name, share in SHARES.items()}
        for name in (STDLIB, "python_reference"):  # few files, so all of each
            self.pool[name].max_per_file = None
        self.target = Budget(STDLIB, target_bytes, max_per_file=None)
        self.num_unparsed = 0

    def collect(self, stdlib: Path, packages: Sequence[Path]) -> None:
        """Read the standard library, then the packages, by turns until the budgets are full."""
        kinds = _by_kind(stdlib)
        self._stdlib(stdlib, by_turns(kinds["python"]))
        self._read(stdlib, "python_reference", ["pydoc_data/topics.py"])
        for root in packages:
            kinds = _by_kind(root)
            self._packages(root, by_turns(kinds.pop("python", [])))
            for kind, files in sorted(kinds.items()):
                self._read(root, kind, by_turns(files))

    def _stdlib(self, root: Path, files: list[str]) -> None:
        pool = self.pool[STDLIB]
        for file in files:
            budget = self.target if in_target(file) else pool
            if not budget.full and (texts := self._parse(root, file, corpus_text.docstrings)):
                budget.add(file, texts)

    def _packages(self, root: Path, files: list[str]) -> None:
        names = ("package_docstrings", "python_code", "comments", "messages")
        docstrings, code, comments, messages = budgets = [self.pool[name] for name in names]
        for file in files:
            if all(budget.full for budget in budgets):
                return
            if texts := self._parse(root, file, corpus_text.python_texts):
                docstrings.add(file, texts.docstrings)
                code.add(file, texts.code)
                comments.add(file, texts.comments)
                messages.add(file, texts.messages)

    def _read(self, root: Path, kind: str, files: list[str]) -> None:
        budget = self.pool["readmes" if kind == "metadata" else kind]
        for file in files:
            if budget.full:
                return
            budget.add(file, self._parse(root, file, _READERS[kind]) or [])

    def _parse(self, root: Path, file: str, reader: Callable[[str], T]) -> T | None:
        try:
            return reader(read_text(root / file))
        except (SyntaxError, ValueError, RecursionError, OSError):
            self.num_unparsed += 1
            return None
