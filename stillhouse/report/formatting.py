"""Formats of numbers, marked texts and texts of users."""

import re
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from markupsafe import Markup, escape

from stillhouse.report.blocks import Cell

NARROW = "\u202f"
"""Narrow no-break space, between a number and its unit."""
DASH = "–"
_UNCARRIED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
MARKS = re.compile(r"\*\*(.+?)\*\*|`([^`]+)`|\[(pool|kept|cut|restart): ([^]]+)\]")
"""Emphasis, code, and words in the colour of a key, in a marked text."""


def visible(value: Any) -> Any:
    """A text with the characters that HTML or UTF-8 cannot carry made visible; others unchanged.

    C0 controls become their pictures (U+2400 ff.); C1 controls, lone surrogates and noncharacters
    become U+FFFD. Direction controls stay: each text is isolated by its element.
    """

    def sign(match: re.Match[str]) -> str:
        code = ord(match[0])
        if code == 0x0D:
            return ""
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return _UNCARRIED.sub(sign, value) if type(value) is str else value


def marked(text: str) -> Markup:
    """A marked text as escaped HTML."""

    def element(match: re.Match[str]) -> str:
        strong, code, key, words = match.groups()
        if key:
            return f'<span class="key {key}">{words}</span>'
        return f"<em>{strong}</em>" if strong else f"<code>{code}</code>"

    return Markup(MARKS.sub(element, str(escape(visible(text)))))


def words(name: str) -> str:
    return name.replace("_", " ")


def number_of(count: int, noun: str) -> str:
    """`1 variant`, `2 variants`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def decimals(value: float | None, places: int = 3) -> str:
    return DASH if value is None else minus(f"{value:.{places}f}")


def signed(value: float | None, places: int = 3) -> str:
    return DASH if value is None else minus(f"{value:+.{places}f}")


def compact(count: float | None) -> str:
    """A count: in full below 10,000, else three digits and k, M, B or T; a dash for None."""
    if count is None:
        return DASH
    return f"{count:,.0f}" if abs(count) < 10_000 else _scaled(count, "k", "M", "B", "T")


def flops(count: float | None) -> str:
    """Floating-point operations with three digits and an SI prefix; a dash for none."""
    return _scaled(count, "k", "M", "G", "T", "P", "E", "Z") + "FLOP" if count else DASH


def num_bytes(count: float) -> str:
    """Bytes with three digits and a decimal prefix."""
    return f"{count:.0f}{NARROW}B" if count < 1000 else _scaled(count, "k", "M", "G", "T") + "B"


def percent(share: float) -> str:
    """A share as a percentage with two to three digits."""
    value = 100 * share
    places = 2 if abs(value) < 1 else 1
    if 0 < value < 0.01:
        return f"<{NARROW}0.01{NARROW}%"
    return f"{minus(f'{value:.{places}f}') if value else '0'}{NARROW}%"


def ratio(value: float | None) -> str:
    """A factor, such as x3.1; a dash for None."""
    if value is None:
        return DASH
    return f"×{value:.{0 if value >= 10 or not value else 1 if value >= 1 else 2}f}"


def duration(seconds: float | None) -> str:
    """Seconds as s, min and s, or h and min; a dash for none."""
    if not seconds:
        return DASH
    if seconds < 59.5:
        return f"{seconds:.1f}{NARROW}s" if seconds < 9.95 else f"{seconds:.0f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NARROW}min {rest:02d}{NARROW}s"
    return f"{minutes // 60:,}{NARROW}h {minutes % 60:02d}{NARROW}min"


def day(iso: str) -> str:
    """An ISO 8601 time as `21 November 2026, 14:05 UTC`."""
    time = datetime.fromisoformat(iso)
    zone = f" {time.tzname()}" if time.tzinfo else ""
    return f"{time.day} {time:%B %Y, %H:%M}{zone}"


def hundredths(share: float) -> str:
    """A share in percent, without the sign."""
    return decimals(100 * share, 1)


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "code": str,
    "number": lambda value: f"{value:,.10g}",
    "bytes": num_bytes,
    "compact": compact,
    "flops": flops,
    "percent": percent,
    "hundredths": hundredths,
    "ratio": ratio,
    "duration": duration,
    "short": lambda value: f"{value:.3g}",
    "signed": signed,
    **{f"decimals{n}": partial(decimals, places=n) for n in (2, 3, 4)},
}
"""Formats of a table's columns."""


def cell(value: Cell, form: str) -> tuple[str, str]:
    """A cell's text and, of a mean, `± standard deviation` if there is one."""
    if isinstance(value, list):
        mean, deviation = value
        how = "decimals3" if form == "signed" else form
        return cell(mean, form)[0], "" if deviation is None else f"± {FORMATS[how](deviation)}"
    if value is None:
        return DASH, ""
    return value if isinstance(value, str) else FORMATS[form](value), ""


def _scaled(value: float, *units: str) -> str:
    """Three significant digits, a narrow space and the unit of 1000, 1000^2, ..."""
    unit = ""
    for step in units:
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, step
    places = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{minus(f'{value:.{places}f}')}{NARROW}{unit}"
