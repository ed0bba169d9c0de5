"""A result as one self-contained HTML page: no script, no network.

jinja2 escapes every value, characters that HTML cannot carry are made visible first, and the
page's Content-Security-Policy forbids loading or running anything.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stillhouse.errors import ArtifactError
from stillhouse.report import charts, formatting
from stillhouse.report.blocks import Result
from stillhouse.report.lineage import lineage
from stillhouse.storage.commit import replace
from stillhouse.storage.filesystem import join, read_bytes

CHARTS = {
    "curves": charts.curves,
    "histogram": charts.histogram,
    "cells": charts.cells,
    "heat": charts.heat,
    "lineage": lineage,
}


def write(result: Result) -> dict[str, Any]:
    """Write `report.json` and `report.html` beside the run's record; returns the numbers."""
    replace(join(result.numbers["run"], "report.json"), result.to_json())
    draw(result, result.numbers["run"])
    return result.numbers


def draw(result: Result, run_uri: str) -> str:
    """Write `report.html`; returns its URI."""
    page = join(run_uri, "report.html")
    replace(page, render(result).encode("utf-8", "replace"))
    return page


def read(run_uri: str) -> Result:
    """The stored result of a run.

    Raises:
        FileNotFoundError: there is none yet. ArtifactError: it is broken, or of another version.
    """
    try:
        return Result.from_json(read_bytes(join(run_uri, "report.json")))
    except ValueError as error:
        what = str(error).splitlines()[0]
        raise ArtifactError(
            f"{run_uri}/report.json is broken or of another version: {what}"
        ) from None


def render(result: Result) -> str:
    template = _environment().get_template("page.html.j2")
    return template.render(result=result, charts=CHARTS, as_text=formatting.cell)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=formatting.visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(marked=formatting.marked, day=formatting.day)
    return environment
