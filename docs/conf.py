"""How Sphinx builds the site: `make docs`. The pages are Markdown and read well without it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import stillhouse

project = "Stillhouse"
release = stillhouse.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"Stillhouse {release}"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
exclude_patterns = ["_build"]
