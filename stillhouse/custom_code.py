"""Classes and functions of the user's that a spec names as `module:name`.

They are found on the driver without running them, known by the content of their files, and carried
to the workers, which import these files alone. Nothing of them is ever read from the store.
"""

import ast
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from stillhouse.errors import CustomCodeError, MissingExtraError, SpecError
from stillhouse.fingerprint import fingerprint, sha256

MAX_BYTES = 2_000_000
CLASS_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
_OURS = {"stillhouse", "ray", "torch"}
"""Packages that every worker has."""


@dataclass(frozen=True, slots=True)
class CustomCode:
    """Code that a spec names: `name` as there, `files` the sources by path, sorted."""

    name: str
    files: tuple[tuple[str, bytes], ...]

    @property
    def digest(self) -> str:
        return fingerprint([self.name, [[path, sha256(data)] for path, data in self.files]])

    def identity(self) -> str:
        return self.digest

    @property
    def tree(self) -> ast.Module:
        """The syntax tree of the module that holds the name."""
        path = self.name.partition(":")[0].replace(".", "/")
        files = dict(self.files)
        return ast.parse(files[f"{path}.py" if f"{path}.py" in files else f"{path}/__init__.py"])

    def literal(self, name: str) -> Any:
        """The value that the class assigns to `name`, where it is a literal; else None."""
        wanted = self.name.partition(":")[2]
        for node in self.tree.body:
            for line in node.body if isinstance(node, ast.ClassDef) and node.name == wanted else ():
                targets = line.targets if isinstance(line, ast.Assign) else []
                if isinstance(line, ast.AnnAssign):
                    targets = [line.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    try:
                        return ast.literal_eval(line.value)  # pyright: ignore
                    except ValueError:
                        return None
        return None

    def build(self, settings: Mapping[str, Any]) -> Any:
        """Import the class from these files alone, and make an object of it.

        Raises:
            CustomCodeError: whatever the code raised.
        """
        module, _, name = self.name.partition(":")
        try:
            return getattr(import_code(self, module), name)(**settings)
        except Exception as error:
            raise self.failed("cannot be made", error) from error

    def failed(self, what: str, error: Exception) -> CustomCodeError:
        """What the code raised, with the last line of it that the exception came through."""
        place, files, trace = "", {path for path, _ in self.files}, error.__traceback__
        while trace is not None:
            module = str(trace.tb_frame.f_globals.get("__name__", "")).replace(".", "/")
            if not files.isdisjoint((path := f"{module}.py", f"{module}/__init__.py")):
                place = f" ({path}:{trace.tb_lineno})"
            trace = trace.tb_next
        first = (str(error).strip().splitlines() or [""])[0][:300]
        return CustomCodeError(f"{self.name} {what}: {type(error).__name__}: {first}{place}")


class _Finder(MetaPathFinder, InspectLoader):
    """Imports from a `CustomCode`; nothing is written to a disk."""

    def __init__(self, code: CustomCode) -> None:
        self.code = code
        self._sources = {path: data.decode() for path, data in code.files}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._file(fullname) is None:
            return None
        return spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return any(path.startswith(f"{fullname.replace('.', '/')}/") for path in self._sources)

    def get_source(self, fullname: str) -> str:
        """The text of the module; empty for a folder without `__init__.py`."""
        return self._sources.get(self._file(fullname) or "", "")

    def _file(self, fullname: str) -> str | None:
        path = fullname.replace(".", "/")
        if self.is_package(fullname):
            return f"{path}/__init__.py"
        return f"{path}.py" if f"{path}.py" in self._sources else None


def import_code(code: CustomCode, module: str) -> ModuleType:
    """The module as `code` has it, also where another version of it was imported before."""
    first = sys.meta_path[0]
    if not isinstance(first, _Finder) or first.code != code:
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        sys.meta_path.insert(0, _Finder(code))
        top = module.partition(".")[0]
        for name in [n for n in sys.modules if n == top or n.startswith(f"{top}.")]:
            del sys.modules[name]
    return importlib.import_module(module)


def find_class(place: str, name: str, methods: Sequence[str]) -> CustomCode:
    """The code of a class `module:Class` in the working directory or on Python's path.

    Args:
        place: its key in the spec, for messages.
        name: as in the spec.
        methods: that it has to have, unless it has a base class that could bring them.

    Raises:
        SpecError: no such module or class, a module that cannot be parsed, a missing method, a
            package of a taken name, too much code.
    """
    code = _find_module(place, name)
    wanted = name.partition(":")[2]
    classes = {node.name: node for node in code.tree.body if isinstance(node, ast.ClassDef)}
    if wanted not in classes:
        listed = ", ".join(sorted(classes)) or "none"
        raise SpecError(f"`{place}: {name}`: the module has no class `{wanted}`, only: {listed}")
    node = classes[wanted]
    defined = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    missing = [method for method in methods if method not in defined]
    if missing and not node.bases:
        raise SpecError(f"`{place}: {name}`: the class has no method {', '.join(missing)}")
    return code


def find_named(place: str, name: str) -> CustomCode | None:
    """The code of `module:name` in a folder of the user's; None where it is built in or
    belongs to an installed package, which workers import themselves.

    Raises:
        SpecError: no such module, no such name in it, or too much code.
    """
    located = _locate(name)
    installed = located is not None and located[0].name in ("site-packages", "dist-packages")
    if installed or _top_package(name) in _OURS:
        return None
    code, wanted = _find_module(place, name), name.partition(":")[2]
    defined: set[str] = set()
    for node in ast.walk(code.tree):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                defined.add(node.name)
            case ast.alias():
                defined.add(node.asname or node.name)
            case ast.Name(ctx=ast.Store()):
                defined.add(node.id)
            case _:
                pass
    if not {wanted, "*"} & defined:
        raise SpecError(f"`{place}: {name}`: the module has no `{wanted}`")
    return code


def _top_package(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


def _find_module(place: str, name: str) -> CustomCode:
    """The module alone where it is not in a package, else all Python files of the package."""
    top = _top_package(name)
    if top in _OURS:
        raise SpecError(f"`{place}: {name}`: `{top}` is taken: give your package another name")
    located = _locate(name)
    if located is None:
        raise SpecError(
            f"`{place}: {name}`: there is no module `{name.partition(':')[0]}` here: run in the "
            f"folder that holds `{top}`, or install it"
        )
    root, module = located
    paths = sorted((root / top).rglob("*.py")) if (root / top).is_dir() else [module]
    files = tuple((path.relative_to(root).as_posix(), path.read_bytes()) for path in paths)
    size = sum(len(data) for _, data in files)
    if size > MAX_BYTES:
        raise SpecError(
            f"`{place}: {name}`: {size:,} bytes of code, {MAX_BYTES:,} are allowed: put it into a "
            "small module of its own"
        )
    try:
        ast.parse(module.read_bytes())
    except SyntaxError as error:
        message = f"`{place}: {name}`: {module}:{error.lineno}: {error.msg}"
        raise SpecError(message) from None
    return CustomCode(name, files)


def _locate(name: str) -> tuple[Path, Path] | None:
    """The folder that Python would find the module in, and its file."""
    file = name.partition(":")[0].replace(".", "/")
    for folder in [os.getcwd(), *sys.path]:
        for module in (Path(folder, f"{file}/__init__.py"), Path(folder, f"{file}.py")):
            if module.is_file():
                return Path(folder), module
    return None


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
        return getattr(importlib.import_module(module), wanted)
    except (ImportError, AttributeError) as error:
        missing = MissingExtraError.of(error) if isinstance(error, ImportError) else None
        raise missing or ValueError(f"`{name}` cannot be imported: {error}") from error
