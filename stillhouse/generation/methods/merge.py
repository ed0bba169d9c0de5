"""Merging: two seeds of compatible kinds become one instruction, which the strong model answers.

The text form of mixing two inputs and letting a language model merge their captions. Two seeds are
compatible if they share a skill or the use case, as the strong model describes them.
"""

from collections.abc import Sequence
from typing import ClassVar

from stillhouse.generation.asking import Item, Program
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generated, Generation, Workshop, usable
from stillhouse.generation.methods.codec import describe
from stillhouse.generation.methods.prefer import drawn_pairs
from stillhouse.generation.screening import answer_fault

_PROMPT = """\
Write one request that asks for what both requests below ask for, so that one answer satisfies \
it. It is fluent, complete in itself, and not just the two one after the other.

First request:
{first}

Second request:
{second}

Reply with the new request alone."""

_DRAWS = 50
"""Of pairs of seeds, for each pair that is wanted."""


class Merge(Generation):
    """Settings of merging."""

    prompts: ClassVar[str] = "merge-1"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "response", "first", "second")

    name: str = "merge"

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        described = workshop.run("encode", "encode", seeds)
        of = {one["seed"]: one for one in usable(workshop, described)}
        known = [seed for seed in seeds if seed["id"] in of]
        pairs: list[tuple[Item, Item]] = []
        for i, j in drawn_pairs(len(known), _DRAWS * self.num_pairs, self.seed):
            if compatible(of[known[i]["id"]], of[known[j]["id"]]):
                pairs.append((known[i], known[j]))
            if len(pairs) == self.num_pairs:
                break
        items = [{"pair": pair, "draw": n} for n, pair in enumerate(pairs)]
        made = usable(workshop, workshop.run("merge", "write", items))
        kept = workshop.screened(made, "instruction", "response")
        return Generated(kept, [len(kept)])

    def encode(self, seed: Item, judge: Judge) -> Program:
        """The use case and skills of a seed."""
        return (yield from describe(self, seed))

    def write(self, item: Item, judge: Judge) -> Program:
        """Both seeds as one instruction, and its answer."""
        first, second = item["pair"]
        prompt = _PROMPT.format(first=first["instruction"], second=second["instruction"])
        [said] = yield [self.writing(prompt, self.seed_of(item["draw"]))]
        made: Item = {"first": first["id"], "second": second["id"], "instruction": said.text}
        fault = answer_fault(said)
        if fault:
            return made | {"fault": fault}
        [answer] = yield [self.answering(said.text)]
        return made | {"fault": answer_fault(answer), "response": answer.text}

    def calls(self, num_seeds: int) -> dict[str, int]:
        """A call to merge and one to answer, after those that describe the seeds."""
        pairs = num_seeds * (num_seeds - 1) // 2
        return {"encode": 2 * num_seeds, "merge": 2 * min(self.num_pairs, pairs)}


def compatible(one: Item, other: Item) -> bool:
    """Whether two descriptions share the use case or a skill."""
    return one["use_case"] == other["use_case"] or not {*one["skills"]}.isdisjoint(other["skills"])
