"""What a job says of its result, as blocks that the page and the terminal render and JSON stores.

A *marked* text is prose of ours: `**words**` stand out, words between backticks are code, and
`[pool: words]` carry the colour of `pool`, `kept`, `cut` or `restart`. Everything else is plain.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, TypeAdapter

Cell: TypeAlias = str | int | float | list[float | None] | None
"""A value; several, such as a mean and a standard deviation, as a list."""
Points: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, marked, or `code` as it is. With `terminal` the terminal shows it too."""

    text: str
    role: Literal["story", "intro", "note", "cut", "code"] = "intro"
    terminal: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class Fact:
    """A name, its value, and what else there is to say of it."""

    name: str
    value: str
    note: str = ""
    main: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts as large `tiles`, or a `list`; a bar above them is filled to `share` of its width."""

    facts: list[Fact]
    style: Literal["tiles", "list"] = "tiles"
    share: float | None = None
    terminal: bool = False
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, the first of which names the row.

    Attributes:
        columns: title -> how its cells are shown: `text`, `bars`, or a function of `formatting`
            for numbers, and `wide` behind it where a narrow page leaves the column out.
        rows: of as many cells.
        main: rows of this name stand out.
        totals: the last rows.
        shown: how many rows are open, the others folded.
        style: `stacked` rows have two lines where the page is narrow.
    """

    columns: dict[str, str]
    rows: list[list[Cell]]
    caption: str = ""
    main: str = ""
    totals: list[list[Cell]] = field(default_factory=list[list[Cell]])
    shown: int = 1_000_000
    style: Literal["full", "short", "stacked"] = "full"
    terminal: bool = False
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True)
class Curves:
    """Curves: the mean over the seeds, and a band from the least to the greatest.

    Attributes:
        caption: marked.
        curves: name -> points (x, y) of each seed.
        main: the name that stands out.
        settled_from: the axis fits what lies behind this share of the way.
        marks: places of vertical marks.
        num_named: how many other curves have their names; the rest are faint.
    """

    caption: str
    curves: dict[str, list[Points]]
    main: str = ""
    x_title: str = "tokens trained on"
    y_title: str = "held-out loss"
    settled_from: float = 0.08
    from_zero: bool = False
    marks: list[float] = field(default_factory=list[float])
    num_named: int = 8
    kind: Literal["curves"] = "curves"


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram: counts by score over ascending `edges` [n+1], of `pool` and `kept` [n]."""

    caption: str
    edges: list[float]
    pool: list[int]
    kept: list[int]
    cut: float | None
    unit: str = ""
    kind: Literal["histogram"] = "histogram"


@dataclass(frozen=True, slots=True)
class Cells:
    """Counts [x, y] by prior and conditional loss over `edges` [n+1], and the line of the cut."""

    caption: str
    edges: list[float]
    pool: list[list[int]]
    kept: list[list[int]]
    cut: float | None
    kind: Literal["cells"] = "cells"


@dataclass(frozen=True, slots=True)
class Heat:
    """Shares [K][B] of `names` in each bin of `num_steps` steps."""

    caption: str
    names: list[str]
    shares: list[list[float]]
    num_steps: int
    kind: Literal["heat"] = "heat"


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Pictures (base64 PNG) under one name, and smaller ones beside them."""

    name: str
    images: list[str]
    beside: list[str] = field(default_factory=list[str])
    main: bool = False


@dataclass(frozen=True, slots=True)
class Images:
    """Pictures in `pairs`, in `strips` under each other, or the same ones at several `stages`.

    `labels`: what they are, and the smaller ones, for who cannot see them.
    """

    rows: list[ImageRow]
    style: Literal["pairs", "strips", "stages"]
    labels: tuple[str, str] = ("synthetic", "real")
    kind: Literal["images"] = "images"


@dataclass(frozen=True, slots=True)
class Card:
    """A text to read: its beginning, and the whole with its facts when it is opened."""

    head: str
    source: str
    text: str
    facts: list[Fact]


@dataclass(frozen=True, slots=True)
class Cards:
    """Cards under one title."""

    title: str
    cards: list[Card]
    style: Literal["kept", "pool"] = "pool"
    kind: Literal["cards"] = "cards"


@dataclass(frozen=True, slots=True)
class Warn:
    """A reason to doubt a result, marked: what was seen; what it means and what to do."""

    title: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Warnings:
    """What to look at first; `checked` says what was, where there is nothing."""

    warnings: list[Warn]
    checked: str = ""
    kind: Literal["warnings"] = "warnings"


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks side by side, or (with a `summary`) folded under a line."""

    blocks: "list[Block]"
    summary: str = ""
    kind: Literal["group"] = "group"


_Chart = Curves | Histogram | Cells | Heat
_Any = Text | Facts | Table | _Chart | Images | Cards | Warnings | Group
Block: TypeAlias = Annotated[_Any, Discriminator("kind")]


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a title; `name` is the anchor."""

    name: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True, slots=True)
class Result:
    """What a job made: `numbers` for programs, `sections` for people.

    Attributes:
        job: its kind.
        title: of the page.
        created: ISO 8601.
        numbers: the object of `run --json`; `artifacts` in it are URIs.
        sections: the page from top to bottom.
        footer: the small print.
    """

    job: str
    title: str
    created: str
    numbers: dict[str, Any]
    sections: list[Section]
    footer: str = ""

    def find(self, section: str, kind: str) -> list[Any]:
        """Every block of a kind in a section, in its groups too."""
        blocks = next((one.blocks for one in self.sections if one.name == section), [])
        inner = [in_it for one in blocks if isinstance(one, Group) for in_it in one.blocks]
        return [one for one in [*blocks, *inner] if one.kind == kind]

    def to_json(self) -> bytes:
        """UTF-8 JSON; numbers that JSON has not are null."""
        return _adapter().dump_json(self, indent=1)

    @staticmethod
    def from_json(document: bytes) -> "Result":
        """What `to_json` wrote; ValueError where `document` is something else."""
        return _adapter().validate_json(document)


@cache
def _adapter() -> TypeAdapter[Result]:
    return TypeAdapter(Result)
