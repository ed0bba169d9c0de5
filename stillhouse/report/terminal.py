"""Output on a terminal: safe against control characters in texts; the main blocks of a result."""

import unicodedata
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from stillhouse.report.blocks import Block, Facts, Group, Result, Table, Text
from stillhouse.report.formatting import MARKS, cell

_SHOWN = "\n\t"
_TURNING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Controls of text direction."""


def plain(text: str) -> str:
    r"""The text with control characters escaped: `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if char in _TURNING or (char not in _SHOWN and unicodedata.category(char) in {"Cc", "Cs"})
        else char
        for char in text
    )


def styled(*parts: str | tuple[str, str]) -> RichText:
    """A line of texts, escaped by `plain`, some as (text, style)."""
    return RichText.assemble(
        *(plain(one) if isinstance(one, str) else (plain(one[0]), one[1]) for one in parts)
    )


class Terminal(Console):
    """A console that escapes strings, in tables too; styles come from `styled`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> RichText:
        return super().render_str(plain(text), **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def say(self, *parts: str | tuple[str, str]) -> None:
        """A line without wrapping, so that paths in it can be copied."""
        self.print(styled(*parts), soft_wrap=True)

    def show(self, result: Result) -> None:
        for section in result.sections:
            for block in section.blocks:
                for one in block.blocks if isinstance(block, Group) else [block]:
                    if getattr(one, "terminal", False):
                        self.block(one, section.title)

    def block(self, block: Block, title: str = "") -> None:
        if isinstance(block, Text):
            self.print(_unmarked(block.text))
        elif isinstance(block, Facts):
            grid = RichTable.grid(padding=(0, 2))
            for fact in block.facts:
                grid.add_row(
                    fact.name, styled((fact.value, "bold" if fact.main else "")), fact.note
                )
            self.print(grid)
        elif isinstance(block, Table):
            self.print(_table(block, title))


def _table(block: Table, title: str) -> RichTable:
    """The table without bars; rows that the page folds are only counted."""
    table = RichTable(title=block.caption or title or None, title_justify="left")
    forms = {n: form.split()[0] for n, form in enumerate(block.columns.values())}
    forms = {n: form for n, form in forms.items() if form != "bars"}
    for n, name in enumerate(block.columns):
        if n in forms:
            table.add_column(name, justify="left" if forms[n] in ("text", "code") else "right")
    for row in block.rows[: block.shown]:
        cells = [" ".join(cell(row[n], form)).strip() for n, form in forms.items()]
        table.add_row(*cells, style="bold" if block.main and row[0] == block.main else None)
    if len(block.rows) > block.shown:
        table.add_row(f"and {len(block.rows) - block.shown} more")
    return table


def _unmarked(text: str) -> RichText:
    """A marked text with its emphasis in bold."""
    parts: list[str | tuple[str, str]] = []
    end = 0
    for match in MARKS.finditer(text):
        parts += [
            text[end : match.start()],
            (match[1] or match[2] or match[4], "bold" if match[1] else ""),
        ]
        end = match.end()
    return styled(*parts, text[end:])
