"""The examples in the library's docstrings run and print what they say."""

import doctest
import importlib.util
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


def test_settings_page_is_up_to_date():
    path = ROOT / "docs" / "make_settings.py"
    made = importlib.util.spec_from_file_location("make_settings", path)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `python docs/make_settings.py`"
