"""Code that a spec names, `module:name`: found, looked at without running it, or imported."""

import ast
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from stillhouse.errors import MissingExtraError, SpecError
from stillhouse.fingerprint import fingerprint, sha256

MAX_BYTES = 2_000_000
OURS = {"stillhouse", "ray", "torch"}
"""Packages that are wherever a job is."""


@dataclass(frozen=True, slots=True)
class FoundCode:
    """A module and all that is sent with it.

    Attributes:
        module: its file.
        tree: what is in it.
        files: sources by path, sorted: the module alone, or all Python files of its package.
    """

    module: Path
    tree: ast.Module
    files: tuple[tuple[str, bytes], ...]


def top_of(name: str) -> str:
    """The outermost package of `package.module:name`."""
    return name.partition(":")[0].partition(".")[0]


def find_module(place: str, name: str, folders: Sequence[str] | None = None) -> FoundCode:
    """The code of `module:name`.

    Args:
        place: key and value in the spec, for messages.
        name: as in the spec.
        folders: where to look; default the working directory, then Python's path.

    Raises:
        SpecError: no such module, one that cannot be parsed, a name of ours, too much code.
    """
    top = top_of(name)
    if top in OURS:
        raise SpecError(f"`{place}`: `{top}` is taken: call your package otherwise")
    found = _located(name, folders)
    if found is None:
        module = name.partition(":")[0]
        raise SpecError(
            f"`{place}`: there is no module `{module}` here: run in the folder that holds `{top}`, "
            "or install it"
        )
    root, source = found
    paths = sorted((root / top).rglob("*.py")) if (root / top).is_dir() else [source]
    files = tuple((p.relative_to(root).as_posix(), p.read_bytes()) for p in paths)
    _check_size(place, files)
    return FoundCode(source, _parsed(place, source), files)


def find_class(
    place: str, name: str, methods: Sequence[str], folders: Sequence[str] | None = None
) -> tuple[FoundCode, ast.ClassDef]:
    """The code of a class `module:Class`, and what is written of the class itself.

    Raises:
        SpecError: as `find_module`; no such class, or one without these methods (where it has no
            base that could have them).
    """
    found, wanted = find_module(place, name, folders), name.partition(":")[2]
    classes = {node.name: node for node in found.tree.body if isinstance(node, ast.ClassDef)}
    if wanted not in classes:
        there = ", ".join(sorted(classes)) or "none"
        raise SpecError(f"`{place}`: no such class in {found.module}; there: {there}")
    node = classes[wanted]
    defined = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    missing = [method for method in methods if method not in defined]
    if missing and not node.bases:
        raise SpecError(f"`{place}`: the class has no method {', '.join(missing)}")
    return found, node


def literal_of(node: ast.ClassDef, name: str) -> Any:
    """The value that a class assigns to a name, where it is a literal; else None."""
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else []
        if isinstance(line, ast.AnnAssign):
            targets = [line.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                return ast.literal_eval(line.value)  # pyright: ignore
            except ValueError:
                return None
    return None


def is_installed(name: str) -> bool:
    """Whether `module:name` belongs to a package that was installed, not to somebody's folder."""
    found = _located(name, None)
    return found is not None and found[0].name in ("site-packages", "dist-packages")


def _located(name: str, folders: Sequence[str] | None) -> tuple[Path, Path] | None:
    """The folder that Python would find the module in, and its file."""
    file = name.partition(":")[0].replace(".", "/")
    for folder in folders if folders is not None else [os.getcwd(), *sys.path]:
        root = Path(folder)
        for module in (root / f"{file}/__init__.py", root / f"{file}.py"):
            if module.is_file():
                return root, module
    return None


def _check_size(place: str, files: Sequence[tuple[str, bytes]]) -> None:
    size = sum(len(data) for _, data in files)
    if size > MAX_BYTES:
        raise SpecError(
            f"`{place}`: {size:,} bytes of code, {MAX_BYTES:,} are allowed: put it into a small "
            "module of its own"
        )


def _parsed(place: str, module: Path) -> ast.Module:
    try:
        return ast.parse(module.read_bytes())
    except SyntaxError as error:
        raise SpecError(f"`{place}`: {module}:{error.lineno}: {error.msg}") from None


def top_names(tree: ast.Module) -> set[str]:
    """What a module defines, assigns or imports, at any depth; `*` where it imports everything."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.alias():
                found.add(node.asname or node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case _:
                pass
    return found


def import_named(name: str, table: Mapping[str, str]) -> Any:
    """What a spec names: by a key of `table`, or as `module:name`, whose module is imported.

    The folder that the job is run in is looked at after Python's path, as it is in workers.

    Raises:
        ValueError: no such name, or it cannot be imported. MissingExtraError: an extra is missing.
    """
    if ":" not in name and name not in table:
        known = ", ".join(table)
        raise ValueError(f"`{name}` is none of {known}, nor `package.module:Class` of your own")
    module, _, wanted = table.get(name, name).partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(import_module(module), wanted)
    except (ImportError, AttributeError) as error:
        missing = MissingExtraError.of(error) if isinstance(error, ImportError) else None
        raise missing or ValueError(f"`{name}` cannot be imported: {error}") from error


def code_digest(name: str) -> str | None:
    """Fingerprint of the sources of `module:name`; None for ours and installed packages.

    Raises:
        SpecError: as `find_module`.
    """
    if top_of(name) in OURS or is_installed(name):
        return None
    files = find_module(f"name: {name}", name).files
    return fingerprint([[path, sha256(data)] for path, data in files])
