"""Text for terminals: what users and data wrote is shown, never obeyed."""

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

_SHOWN = "\n\t"
_TURNING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""What makes text run the other way."""


def plain(text: str) -> str:
    r"""The text with what would steer a terminal spelled out: `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if char in _TURNING or (char not in _SHOWN and unicodedata.category(char) in {"Cc", "Cs"})
        else char
        for char in text
    )


def styled(*parts: str | tuple[str, str]) -> Text:
    """A line of plain texts, some as (text, style)."""
    return Text.assemble(
        *(plain(one) if isinstance(one, str) else (plain(one[0]), one[1]) for one in parts)
    )


class Terminal(Console):
    """A console for which a string is plain text, in tables too: styles come from `styled`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as it is, whatever it holds."""
        return super().render_str(plain(text), **options)

    def on_broken_pipe(self) -> None:
        """As for `print`: whoever called finds out."""
        raise BrokenPipeError
