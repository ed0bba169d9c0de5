"""Rephrasing: every seed in other words, with the seed's own answer or the strong model's.

The simplest use of a generator (Maini et al. 2024, arXiv 2401.16380, rephrase whole web texts). A
seed is rephrased in several styles in turn until there are `num_pairs`.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from stillhouse.generation.asking import Item, Program
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generated, Generation, Workshop, usable
from stillhouse.generation.screening import answer_fault

_PROMPT = """\
Say the request below in other words, {style}. Keep its meaning, and everything that is needed to \
answer it.

Request:
{instruction}

Reply with the new request alone."""


class Rephrase(Generation):
    """Settings of rephrasing."""

    prompts: ClassVar[str] = "rephrase-1"
    columns: ClassVar[tuple[str, ...]] = ("instruction", "response", "seed", "style")

    name: str = "rephrase"
    styles: list[str] = Field(
        default=["plainly", "as a native speaker would ask a friend", "formally and in full"],
        min_length=1,
        description="in turn; each completes `Say the request in other words, ...`",
    )

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        wanted = min(self.num_pairs, len(seeds) * len(self.styles))
        items = [
            {"from": seeds[i % len(seeds)], "style": self.styles[i // len(seeds)], "draw": i}
            for i in range(wanted)
        ]
        made = usable(workshop, workshop.run("rephrase", "write", items))
        kept = workshop.screened(made, "instruction", "response")
        return Generated(kept, [len(kept)])

    def write(self, item: Item, judge: Judge) -> Program:
        """The seed in other words, and its answer."""
        seed = item["from"]
        prompt = _PROMPT.format(style=item["style"], instruction=seed["instruction"])
        [said] = yield [self.writing(prompt, self.seed_of(item["draw"]))]
        made: Item = {"seed": seed["id"], "style": item["style"], "instruction": said.text}
        fault, response = answer_fault(said), seed.get("response")
        if not fault and response is None:
            [answer] = yield [self.answering(said.text)]
            fault, response = answer_fault(answer), answer.text
        return made | {"fault": fault, "response": response}

    def calls(self, num_seeds: int) -> dict[str, int]:
        """A call to rephrase, and one to answer where the seed has no answer."""
        return {"rephrase": 2 * min(self.num_pairs, num_seeds * len(self.styles))}
