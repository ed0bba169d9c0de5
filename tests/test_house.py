"""The house rules that no tool checks: floors, cycles, size, docstrings, forbidden calls and names.

A rule takes one file's path (relative to the root) and text, and returns what it found. Each is
tried on small sources that break it before the project's files are held against it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("stillhouse", "actors", "pipelines", "jobs")  # from the ground up
OUTSIDE = ("benchmarks", "examples", "tests")
PLACES = (*FLOORS, *OUTSIDE, "docs", "deploy", ".ci")
WRITTEN = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".j2", ".css", ".sh", ""}
MAX_LINES = 400
HEAVY = ("torch", "pyarrow", "fsspec", "pydantic", "ray", "numpy")
UNSAFE_CALLS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system"),
}
UNSAFE_KEYWORDS = {"trust_remote_code", "shell"}
PRIVATE_NAMES = re.compile(r"(?<![\w.])/work/\w|pypi[.]org|pythonhosted[.]org|npmjs[.]")


def project_files() -> dict[str, str]:
    """Text of all written files by path, without built or downloaded ones."""
    written = [path for path in ROOT.iterdir() if path.is_file()]
    for place in PLACES:
        written += (path for path in (ROOT / place).rglob("*") if path.is_file())
    names = {str(path.relative_to(ROOT)): path for path in written if path.suffix in WRITTEN}
    return {
        name: path.read_text()
        for name, path in sorted(names.items())
        if name != ".git"
        and not name.startswith(("examples/data/", "benchmarks/out/", ".coverage"))
    }


FILES = project_files()
SOURCES = {path: text for path, text in FILES.items() if path.endswith(".py")}


def module_name(path: str) -> str:
    """`a/b.py` and `a/b/__init__.py` are both `a.b`; the upper floors are parts of `stillhouse`."""
    prefix = "stillhouse." if path.split("/")[0] in FLOORS[1:] else ""
    return prefix + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def floor_of(name: str) -> str:
    """The floor of a module's name, or the outermost package of one that is none of ours."""
    top, *rest = name.split(".")
    return rest[0] if top == "stillhouse" and rest and rest[0] in FLOORS[1:] else top


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, `from a import b` as `a.b`, at any depth."""
    package = module_name(f"{Path(path).parent}/__init__.py").split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func))
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def upward_imports(path: str, text: str) -> list[str]:
    """A floor imports itself and the floors below; the ground floor does not know Ray.

    The package's own module names what is public of all floors.
    """
    floor = path.split("/")[0]
    if floor not in FLOORS or path == "stillhouse/__init__.py":
        return []
    above = {*FLOORS[FLOORS.index(floor) + 1 :], *OUTSIDE}
    above |= {"ray"} if floor == "stillhouse" else set()
    return [
        f"{path}:{line}: {floor} imports {name}"
        for line, name in imports(path, ast.parse(text))
        if floor_of(name) in above
    ]


def too_long(path: str, text: str) -> list[str]:
    """No source file above MAX_LINES."""
    count = len(text.splitlines())
    return [f"{path}: {count} lines"] if count > MAX_LINES else []


def unsafe_calls(path: str, text: str) -> list[str]:
    """Nothing that runs what it reads: pickles, YAML tags, a model's own code, a shell."""
    if path.startswith("tests/"):
        return []
    tree = ast.parse(text)
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        if isinstance(node, ast.ImportFrom)
        else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _is_unsafe(node, names)
    ]


def _is_unsafe(call: ast.Call, names: dict[str, str]) -> bool:
    root, dot, rest = ast.unparse(call.func).partition(".")
    called = names.get(root, root) + dot + rest
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if called == "torch.load":
        return given.get("weights_only") != "True"
    return called in UNSAFE_CALLS or any(
        given.get(name, "False") != "False" for name in UNSAFE_KEYWORDS
    )


def private_names(path: str, text: str) -> list[str]:
    """No path of one machine, and no package index's host."""
    return [
        f"{path}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if PRIVATE_NAMES.search(line)
    ]


def import_cycle(sources: dict[str, str]) -> list[str]:
    """The modules of one cycle, imports inside functions included; empty if there is none."""
    modules = {module_name(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, text in sources.items():
        tree = _RuntimeOnly().visit(ast.parse(text))
        needs = {_module_of(name, modules) for _, name in imports(path, tree)}
        graph[module_name(path)] = needs - {"", module_name(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


class _RuntimeOnly(ast.NodeTransformer):
    """Leaves out what only a type checker sees: a name in an annotation is no dependency."""

    def visit_If(self, node):
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node


def _module_of(name: str, modules: set[str]) -> str:
    """The module that an imported name lives in: its longest prefix in `modules`, or ''."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def heavy_imports(statement: str) -> list[str]:
    """Which of HEAVY a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize("place", [*FLOORS, *OUTSIDE])
def test_sources_are_found(place):
    assert any(path.startswith(f"{place}/") for path in SOURCES)


@pytest.mark.parametrize("rule", [upward_imports, too_long, unsafe_calls])
def test_every_source_keeps(rule):
    assert [found for path, text in SOURCES.items() for found in rule(path, text)] == []


def test_no_two_classes_have_one_name():
    found: dict[str, list[str]] = {}
    for path, text in SOURCES.items():
        if path.startswith(FLOORS):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_no_file_names_a_machine_or_an_index():
    assert [found for path, text in FILES.items() for found in private_names(path, text)] == []


def test_no_import_cycle():
    assert import_cycle({p: text for p, text in SOURCES.items() if p.startswith(FLOORS)}) == []


def test_import_of_the_library_is_light():
    assert heavy_imports("import stillhouse") == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (upward_imports, "stillhouse/a.py", "import ray"),
        (upward_imports, "stillhouse/a.py", "def f():\n    from ray import data"),
        (upward_imports, "stillhouse/a.py", "import_module('ray.data')"),
        (upward_imports, "stillhouse/text/a.py", "from stillhouse.actors.scorer import Scorer"),
        (upward_imports, "stillhouse/text/a.py", "from ..actors import scorer"),
        (upward_imports, "actors/a.py", "import stillhouse.pipelines.steps as steps"),
        (upward_imports, "pipelines/a.py", "from stillhouse.jobs import cli"),
        (upward_imports, "jobs/a.py", "import tests.conftest"),
        (too_long, "jobs/a.py", "\n" * (MAX_LINES + 1)),
        (unsafe_calls, "jobs/a.py", "import pickle\npickle.load(file)"),
        (unsafe_calls, "jobs/a.py", "import pickle as p\np.loads(data)"),
        (unsafe_calls, "jobs/a.py", "from yaml import load as parse\nparse(text)"),
        (unsafe_calls, "jobs/a.py", "import torch\ntorch.load(path)"),
        (unsafe_calls, "jobs/a.py", "import torch\ntorch.load(path, weights_only=False)"),
        (unsafe_calls, "jobs/a.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        (unsafe_calls, "jobs/a.py", "subprocess.run(command, shell=flag)"),
        (private_names, "docs/a.md", "see /" + "work/main/docs"),
        (private_names, "Makefile", "pip install -i https://pypi" + ".org/simple"),
    ],
)
def test_rule_finds(rule, path, text):
    assert len(rule(path, text)) == 1


def test_cycle_is_found():
    first = "from stillhouse.actors.second import run"
    second = "def run():\n    from . import third"
    third = "import stillhouse.actors.first"
    sources = {"actors/first.py": first, "actors/second.py": second, "actors/third.py": third}
    assert set(import_cycle(sources)) == {
        f"stillhouse.actors.{name}" for name in ("first", "second", "third")
    }
    assert import_cycle({**sources, "actors/third.py": "import stillhouse.actors.fourth"}) == []
    type_only = "if TYPE_CHECKING:\n    import stillhouse.actors.first"
    assert import_cycle({**sources, "actors/third.py": type_only}) == []


def test_heavy_import_is_found():
    assert heavy_imports("import numpy") == ["numpy"]
