"""Preference labels: which of two texts is more so, asked of a model in both orders.

Labels for a pairwise head beside a classifier (Prefer to Classify, Kim et al. 2023). The texts are
the seeds' instructions; two orders that disagree, or say that both are equal, give no label.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from stillhouse.generation.asking import Ask, Item, Program, Role
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generated, Generation, Workshop, usable

_PROMPT = """\
Which of the two texts below is more {quality}?

First text:
{first}

Second text:
{second}

Reply with one word: first, second or equal."""
_WORD = re.compile(r"\b(first|second|equal)\b", re.I)


class Prefer(Generation):
    """Settings of preference labels."""

    roles: ClassVar[tuple[Role, ...]] = ("judge",)
    prompts: ClassVar[str] = "prefer-1"
    columns: ClassVar[tuple[str, ...]] = ("first", "second", "preferred")

    name: str = "prefer"
    quality: str = Field(default="helpful", description="completes `which text is more ...?`")

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        pairs = drawn_pairs(len(seeds), self.num_pairs, self.seed)
        texts = [seed["instruction"] for seed in seeds]
        items = [{"first": texts[i], "second": texts[j]} for i, j in pairs]
        kept = usable(workshop, workshop.run("prefer", "compare", items))
        return Generated(kept, [len(kept)])

    def compare(self, item: Item, judge: Judge) -> Program:
        """`preferred`: first or second, if both orders agree."""
        texts = item["first"], item["second"]
        prompts = [
            _PROMPT.format(quality=self.quality, first=one, second=other)
            for one, other in (texts, texts[::-1])
        ]
        answers = yield [Ask("judge", one, max_tokens=8, seed=self.seed) for one in prompts]
        said = [preferred(answer.text) for answer in answers]
        swapped = {"first": "second", "second": "first"}
        if None in said:
            return item | {"fault": "a preference that cannot be read"}
        if said[0] == "equal" or said[0] != swapped.get(said[1] or ""):
            return item | {"fault": "no preference in both orders"}
        return item | {"preferred": said[0], "fault": ""}

    def calls(self, num_seeds: int) -> dict[str, int]:
        """Two calls a pair."""
        return {"prefer": 2 * min(self.num_pairs, num_seeds * (num_seeds - 1) // 2)}


def preferred(text: str) -> str | None:
    """The word that was said; None where none or several were.

    >>> preferred("First."), preferred("the first or the second")
    ('first', None)
    """
    found = {word.lower() for word in _WORD.findall(text)}
    return found.pop() if len(found) == 1 else None


def drawn_pairs(count: int, wanted: int, seed: int) -> list[tuple[int, int]]:
    """Different pairs i < j below `count`, at most `wanted`, drawn by the seed."""
    total = count * (count - 1) // 2
    draws = np.random.default_rng([seed, 2])
    seen: dict[int, None] = {}
    if total <= 4 * wanted:
        seen = dict.fromkeys(draws.permutation(total)[:wanted].tolist())
    while len(seen) < min(wanted, total):
        seen[int(draws.integers(total))] = None
    # the number n of a pair is j (j - 1) / 2 + i
    ends = [int((1 + np.sqrt(1 + 8 * n)) // 2) for n in seen]
    return [(n - j * (j - 1) // 2, j) for n, j in zip(seen, ends, strict=True)]
