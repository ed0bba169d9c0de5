"""The result of a job as blocks, which the page and the terminal render and JSON stores.

A *marked* text is our own prose: `**words**` are emphasised, words between backticks are code, and
`[pool: words]` have the colour of `pool`, `kept`, `cut` or `restart`. All other texts are plain.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, TypeAdapter

Cell: TypeAlias = str | int | float | list[float | None] | None
"""A value, or a mean and its standard deviation, or the shares of bars."""
Points: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Text:
    """A marked paragraph, or plain `code`. `terminal`: the terminal shows it, too."""

    text: str
    role: Literal["story", "intro", "note", "cut", "code"] = "intro"
    terminal: bool = False
    kind: Literal["text"] = "text"


@dataclass(frozen=True, slots=True)
class Fact:
    """A name, its value, and a remark."""

    name: str
    value: str
    note: str = ""
    main: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts as large `tiles` or a `list`, below a bar that is filled to `share` of its width."""

    facts: list[Fact]
    style: Literal["tiles", "list"] = "tiles"
    share: float | None = None
    terminal: bool = False
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, the first of which names the row.

    Attributes:
        columns: title -> format of its cells: `text`, `bars` or a key of `formatting.FORMATS`,
            followed by `wide` if narrow pages leave the column out.
        rows: a cell for each column.
        main: rows of this name are highlighted.
        totals: rows at the foot.
        shown: rows beyond this number are folded.
        style: `stacked` rows take two lines on narrow pages.
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
    """Means over the seeds, with a band from the least to the greatest.

    Attributes:
        caption: marked.
        curves: name -> points (x, y) of each seed.
        main: the highlighted name.
        settled_from: the y axis fits the points from this share of the x axis on.
        marks: x of vertical marks.
        num_named: how many other curves are named; the rest are faint.
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
    """A histogram: counts by score over ascending `edges` [n+1], of `pool` and `kept` [n].

    `unit` follows the word score; `noun` is what is counted.
    """

    caption: str
    edges: list[float]
    pool: list[int]
    kept: list[int]
    cut: float | None
    unit: str = ""
    noun: str = "sequences"
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
class Node:
    """A step: its kind of job, its main numbers, a link, and the nodes whose results it uses."""

    name: str
    job: str
    headline: str
    link: str
    needs: list[str]


@dataclass(frozen=True, slots=True)
class Lineage:
    """Nodes, with a line to each from those that it needs."""

    caption: str
    nodes: list[Node]
    kind: Literal["lineage"] = "lineage"


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Pictures (base64 PNG) under a name, with smaller ones beside them."""

    name: str
    images: list[str]
    beside: list[str] = field(default_factory=list[str])
    main: bool = False


@dataclass(frozen=True, slots=True)
class Images:
    """Pictures in `pairs`, in `strips` below each other, or the same ones at several `stages`.

    `labels` are alternative texts of the pictures and of the smaller ones.
    """

    rows: list[ImageRow]
    style: Literal["pairs", "strips", "stages"]
    labels: tuple[str, str] = ("synthetic", "real")
    kind: Literal["images"] = "images"


@dataclass(frozen=True, slots=True)
class Card:
    """A text that opens from its beginning to the whole with its facts."""

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
    """A reason to doubt a result, marked: what was seen, and what it means and what to do."""

    title: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Warnings:
    """What to look at first; without warnings, `checked` says what was checked."""

    warnings: list[Warn]
    checked: str = ""
    kind: Literal["warnings"] = "warnings"


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks side by side or, with a `summary`, folded under it."""

    blocks: "list[Block]"
    summary: str = ""
    kind: Literal["group"] = "group"


_Chart = Curves | Histogram | Cells | Heat | Lineage
_Any = Text | Facts | Table | _Chart | Images | Cards | Warnings | Group
Block: TypeAlias = Annotated[_Any, Discriminator("kind")]


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a title; `name` is the page's anchor."""

    name: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a job: `numbers` for programs, `sections` for people.

    Attributes:
        job: its kind.
        title: of the page.
        created: ISO 8601.
        numbers: the object of `run --json`; `artifacts` in it are URIs.
        sections: the page from top to bottom.
        footer: of the page.
    """

    job: str
    title: str
    created: str
    numbers: dict[str, Any]
    sections: list[Section]
    footer: str = ""

    def find(self, section: str, kind: str) -> list[Any]:
        """Every block of a kind in a section and its groups."""
        blocks = next((one.blocks for one in self.sections if one.name == section), [])
        grouped = [block for one in blocks if isinstance(one, Group) for block in one.blocks]
        return [one for one in [*blocks, *grouped] if one.kind == kind]

    def to_json(self) -> bytes:
        """UTF-8 JSON; NaN and infinities become null."""
        return _adapter().dump_json(self, indent=1)

    @staticmethod
    def from_json(document: bytes) -> "Result":
        """The inverse of `to_json`; ValueError for any other document."""
        return _adapter().validate_json(document)


@cache
def _adapter() -> TypeAdapter[Result]:
    return TypeAdapter(Result)
