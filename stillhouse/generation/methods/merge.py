"""Merging: two seeds of compatible kinds become one instruction, which the strong model answers.

The text form of mixing two inputs and letting a language model merge their captions. Two seeds are
compatible if they share a skill or the use case, as the strong model describes them.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import numpy as np

from stillhouse.generation.asking import Ask, Item, Program
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generated, Generation, Workshop, usable
from stillhouse.generation.methods.codec import describe
from stillhouse.generation.screening import answer_fault

_PROMPT = """\
Write one request that asks for what both requests below ask for, so that one answer satisfies \
it. It is fluent, complete in itself, and not just the two one after the other.

First request:
{first}

Second request:
{second}

Reply with the new request alone."""


class Merge(Generation):
    """Settings of merging."""

    prompts: ClassVar[str] = "merge-1"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "response", "first", "second")

    name: str = "merge"

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        described = workshop.run("encode", "encode", seeds)
        workshop.drop("seed without metadata", [one for one in described if not one["skills"]])
        of = {one["seed"]: one for one in described if one["skills"]}
        pairs = [
            (one, other)
            for one, other in combinations([seed for seed in seeds if seed["id"] in of], 2)
            if compatible(of[one["id"]], of[other["id"]])
        ]
        order = np.random.default_rng([self.seed]).permutation(len(pairs))[: self.num_pairs]
        items = [{"pair": pairs[i], "draw": n} for n, i in enumerate(order.tolist())]
        made = usable(workshop, workshop.run("merge", "write", items))
        kept = workshop.screened(made, "instruction", "response")
        if len(kept) < self.num_pairs:
            workshop.warn(
                f"Only {len(kept):,} of {self.num_pairs:,} pairs: {len(pairs):,} pairs of seeds "
                "share a skill or a use case."
            )
        return Generated(kept, [len(kept)])

    def encode(self, seed: Item, judge: Judge) -> Program:
        """The use case and skills of a seed."""
        return (yield from describe(self, seed))

    def write(self, item: Item, judge: Judge) -> Program:
        """Both seeds as one instruction, and its answer."""
        first, second = item["pair"]
        prompt = _PROMPT.format(first=first["instruction"], second=second["instruction"])
        draw = self.seed * 1_000_003 + item["draw"]
        [said] = yield [Ask("strong", prompt, None, self.temperature, self.max_tokens, draw)]
        made: Item = {"first": first["id"], "second": second["id"], "instruction": said.text}
        fault = answer_fault(said)
        if fault:
            return made | {"fault": fault}
        [answer] = yield [Ask("strong", said.text, None, 0.0, self.max_tokens, self.seed)]
        return made | {"fault": answer_fault(answer), "response": answer.text}

    def calls(self, num_seeds: int) -> dict[str, int]:
        """A call to merge and one to answer, after those that describe the seeds."""
        pairs = num_seeds * (num_seeds - 1) // 2
        return {"encode": 2 * num_seeds, "merge": 2 * min(self.num_pairs, pairs)}


def compatible(one: Item, other: Item) -> bool:
    """Whether two descriptions share the use case or a skill."""
    return one["use_case"] == other["use_case"] or not {*one["skills"]}.isdisjoint(other["skills"])
