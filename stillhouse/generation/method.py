"""What a way to generate consists of: settings, the loop on the driver, the programs of workers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

import stillhouse.report.blocks as b
from stillhouse.generation.asking import Ask, Item, Role
from stillhouse.settings import Count, Settings


class Workshop(Protocol):
    """What the loop of a method may do; the engine gives it to `Generation.make`."""

    def run(self, step: str, program: str, items: Sequence[Item]) -> list[Item]:
        """Run `self.<program>(item, judge)` for every item on the workers, in order."""
        ...

    def screened(self, items: Sequence[Item], *keys: str) -> list[Item]:
        """The items without those whose text at one of `keys` is dropped, with a reason: held-out
        text, or another language; an `instruction` also as a copy of a seed, of a delivered item
        or of an earlier one of `items`.
        """
        ...

    def delivered(self, items: Sequence[Item], key: str) -> None:
        """Let later texts at `key` be compared with those of these items."""
        ...

    def drop(self, reason: str, items: Sequence[Item]) -> None:
        """Count items that are left out."""
        ...

    def warn(self, text: str) -> None:
        """Say something in the report."""
        ...


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of a method.

    Attributes:
        items: what is delivered, each with the keys of `COLUMNS`.
        rounds: delivered items by round.
        numbers: more for `run --json`.
        sections: of the report.
    """

    items: list[Item]
    rounds: list[int]
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])
    sections: list[b.Section] = field(default_factory=list[b.Section])


class Generation(Settings):
    """Settings and behaviour of a way to generate.

    Attributes:
        roles: the models that it asks.
        columns: of the delivered rows, in order: all text, or numbers where `numeric`.
        prompts: version of the prompts, which is kept beside every row.
    """

    roles: ClassVar[tuple[Role, ...]] = ("strong",)
    columns: ClassVar[tuple[str, ...]] = ("instruction", "response")
    numeric: ClassVar[tuple[str, ...]] = ()
    prompts: ClassVar[str] = "1"

    name: str = Field(description="a short one, or `package.module:Class` of your own")
    num_pairs: Count = Field(default=500, description="that are delivered, at most")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=0.7, description="of what is written; judges and answers to compare have 0"
    )
    max_tokens: Count = Field(default=512, description="of an answer of a model")
    seed: Annotated[int, Field(ge=0)] = 0

    def writing(self, prompt: str, seed: int) -> Ask:
        """A call that has the strong model write, with draws by `seed`."""
        return Ask("strong", prompt, None, self.temperature, self.max_tokens, seed)

    def answering(self, instruction: str, role: Role = "strong") -> Ask:
        """A call that has a model answer with its likeliest tokens."""
        return Ask(role, instruction, None, 0.0, self.max_tokens, self.seed)

    def seed_of(self, number: int) -> int:
        """The seed of an item's draws, by its number."""
        return self.seed * 1_000_003 + number

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        """The loop. `seeds` have `id`, `instruction` and, where known, `response`."""
        raise NotImplementedError

    def calls(self, num_seeds: int) -> dict[str, int]:
        """About how many calls each step takes, for `plan`."""
        raise NotImplementedError


def usable(workshop: Workshop, items: Sequence[Item], key: str = "fault") -> list[Item]:
    """The items without a fault; the others are dropped for theirs, such as `reason: details`."""
    for fault in sorted({one[key] for one in items if one[key]}):
        workshop.drop(fault, [one for one in items if one[key] == fault])
    return [one for one in items if not one[key]]
