"""Cron lines: what cron and Kubernetes both understand, checked before anything is written.

Kubernetes reads weekdays as 0 to 6 only, cron takes 7 for Sunday as well; `@reboot`, `@every`
and seconds are known to one of them at most and refused.
"""

import re
from datetime import date, timedelta
from itertools import pairwise

from stillhouse.errors import SpecError

_MONTHS = {
    name: number
    for number, name in enumerate(
        ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1
    )
}
_DAYS = {
    name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))
}
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, _MONTHS),
    ("weekday", 0, 6, _DAYS),
)
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_OUT = "is out of range"
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_PIECE = re.compile(r"(?P<first>\*|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?")


def check_cron(line: str) -> str:
    """A cron line of five fields or a macro such as `@daily`, with single spaces.

    Raises:
        SpecError: naming the field and what is allowed there, or a day that never comes.
    """
    fields = line.split()
    if len(fields) == 1 and fields[0] in _MACROS:
        return fields[0]
    if len(fields) != 5:
        raise SpecError(
            f"--cron {line!r} has {len(fields)} fields, not 5: minute, hour, day of month, month, "
            f"weekday, such as '0 3 * * *'; or one of {', '.join(sorted(_MACROS))}"
        )
    values = [_values(field, *kind, line) for field, kind in zip(fields, _FIELDS, strict=True)]
    _check_day_comes(values[2], values[3], fields, line)
    return " ".join(fields)


def least_gap_s(line: str, zone: str | None = None) -> int:
    """The shortest time between two runs of a checked cron line, in seconds.

    In a time zone an hour less where it may be that a clock is put forward in between.
    """
    fields = _MACROS.get(line, line).split()
    minutes, hours, days, months, weekdays = (
        _values(field, *kind, line) for field, kind in zip(fields, _FIELDS, strict=True)
    )
    either = not fields[2].startswith("*") and not fields[4].startswith("*")
    first = date(2000, 1, 1)
    dates = [
        number
        for number, day in ((n, first + timedelta(n)) for n in range(9 * 366))
        if day.month in months
        and (any if either else all)([day.day in days, day.isoweekday() % 7 in weekdays])
    ]
    times = sorted(60 * hour + minute for hour in hours for minute in minutes)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    overnight = 24 * 60 + times[0] - times[-1]
    gaps += [24 * 60 * (b - a - 1) + overnight for a, b in pairwise(dates)]
    least = min(gaps)
    return 60 * (least - 60 if zone not in {None, "Etc/UTC", "UTC"} and least > 120 else least)


def _values(
    field: str, name: str, lowest: int, highest: int, names: dict[str, int], line: str
) -> set[int]:
    """Everything that a field stands for."""
    found: set[int] = set()
    for piece in field.split(","):
        try:
            found |= set(_range(piece, lowest, highest, names))
        except ValueError as error:
            also = f" or {', '.join(names)}" if names else ""
            raise SpecError(
                f"--cron {line!r}: {name} {piece!r} {error}: use {lowest} to {highest}{also}, "
                "`*`, ranges a-b, lists a,b and steps */n"
            ) from None
    return found


def _range(piece: str, lowest: int, highest: int, names: dict[str, int]) -> range:
    """What one piece of a list stands for: `*`, `a`, `a-b`, each with `/step`; `a/n` has no end."""
    match = _PIECE.fullmatch(piece)
    if match is None or (match["first"] == "*" and match["last"]):
        raise ValueError("cannot be read")
    first = lowest if match["first"] == "*" else _number(match["first"], names)
    if match["last"]:
        last = _number(match["last"], names)
    else:
        last = highest if match["first"] == "*" or match["step"] else first
    step = int(match["step"] or 1)
    if first > last:
        raise ValueError("is backwards" if last >= lowest and first <= highest else _OUT)
    if first < lowest or last > highest:
        raise ValueError(_OUT)
    if not 1 <= step <= highest:
        raise ValueError("has a step out of range")
    return range(first, last + 1, step)


def _number(text: str, names: dict[str, int]) -> int:
    if text.isdecimal():
        return int(text)
    if text.lower() not in names:
        raise ValueError("cannot be read")
    return names[text.lower()]


def _check_day_comes(days: set[int], months: set[int], fields: list[str], line: str) -> None:
    """`0 3 31 2 *` would wait for ever; with a weekday as well, either is enough."""
    if fields[4].startswith("*") and min(days) > max(_LONGEST[month - 1] for month in months):
        raise SpecError(
            f"--cron {line!r} never comes: no month {fields[3]!r} has a day {fields[2]!r}"
        )
