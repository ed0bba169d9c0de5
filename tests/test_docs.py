"""The examples in the library's docstrings run and print what they say."""

import doctest
import importlib.util
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "stillhouse").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if ">>> " in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_in_pages(page, tmp_path):
    """Each `>>>` in a page; the fence's end is no output."""
    examples = tmp_path / page.name
    examples.write_text(page.read_text().replace("```", ""))
    result = doctest.testfile(str(examples), module_relative=False)
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", tmp_path / "state", ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
    )
    assert (built.returncode, built.stderr) == (0, "")
    assert "OwnScorer" in (tmp_path / "site" / "reference.html").read_text()


def test_settings_page_is_up_to_date():
    path = ROOT / "docs" / "make_settings.py"
    made = importlib.util.spec_from_file_location("make_settings", path)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `python docs/make_settings.py`"
