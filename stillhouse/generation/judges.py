"""Judges: how good the answers of the strong model and of the student are.

A judge is a settings class whose program `compare` asks the models. The gap between the two scores
decides what is kept (`stillhouse.generation.methods.codec`).
"""

import re
from collections.abc import Generator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.generation.asking import Answer, Ask
from stillhouse.generation.model_settings import GeneratorModel
from stillhouse.settings import Settings

Scores = tuple[list[float], list[float]]
"""Of the strong model's answer and of the student's, one for each time that they were compared."""

_SCORE = re.compile(r"(?:^|[,;])\W*(first|second)(?: answer)?[\s:*=]*(\d+(?:\.\d+)?)", re.I | re.M)
_PROMPT = """\
Two assistants answered the same request. Rate how helpful, correct, relevant and complete each \
answer is on a scale from 1 (useless) to 10 (excellent). The order of the answers means nothing, \
and a longer answer is not better for being longer.

Request:
{instruction}

First answer:
{first}

Second answer:
{second}

Reply with exactly two lines and nothing else:
First: <number>
Second: <number>"""


Verdict = Literal["win", "tie", "loss"]
"""Of the student against the strong model."""


def verdict(scores: Scores) -> Verdict:
    """A win or a loss if all orders agree on it, else a tie."""
    signs = {
        (student > strong) - (student < strong) for strong, student in zip(*scores, strict=True)
    }
    return "win" if signs == {1} else "loss" if signs == {-1} else "tie"


def recovery_ratio(verdicts: Sequence[Verdict]) -> float | None:
    """The capacity recovery ratio: the share of wins and ties; None without any comparison."""
    return None if not verdicts else 1 - verdicts.count("loss") / len(verdicts)


class Judge(Settings):
    """Settings and behaviour of a judge.

    Attributes:
        scores: True: it asks for likelihoods, which models by `path` alone give.
        prompts: version of its prompts.
    """

    scores: ClassVar[bool] = False
    prompts: ClassVar[str] = "1"

    name: str = Field(description="a short one, or `package.module:Class` of your own")
    model: GeneratorModel | None = Field(default=None, description="default `strong`")

    def compare(
        self, instruction: str, strong: str, student: str, seed: int
    ) -> Generator[list[Ask], list[Answer], Scores | None]:
        """The scores of two answers; None where the judge's words cannot be read."""
        raise NotImplementedError


def parse_scores(text: str) -> tuple[float, float] | None:
    """The first numbers after `First` and `Second`; None where one is missing, or not 1 to 10.

    >>> parse_scores("First: 8\\nSecond: 3/10"), parse_scores("First: 8"), parse_scores("First: 80")
    ((8.0, 3.0), None, None)
    """
    found = {name.lower(): float(value) for name, value in reversed(_SCORE.findall(text))}
    values = [found.get(name, 0.0) for name in ("first", "second")]
    return (values[0], values[1]) if all(1 <= value <= 10 for value in values) else None


class Pairwise(Judge):
    """Asks a model to rate both answers from 1 to 10, in both orders.

    An order whose numbers cannot be read is asked for once more, with another seed.
    """

    prompts: ClassVar[str] = "pairwise-1"

    name: str = "pairwise"
    max_tokens: int = Field(default=32, ge=8, description="of what the judge says")

    def compare(
        self, instruction: str, strong: str, student: str, seed: int
    ) -> Generator[list[Ask], list[Answer], Scores | None]:
        """The strong model's answer is the first one in the first order."""
        orders = [(strong, student), (student, strong)]
        prompts = [
            _PROMPT.format(instruction=instruction, first=one or "(none)", second=other or "(none)")
            for one, other in orders
        ]
        asks = [Ask("judge", prompt, max_tokens=self.max_tokens, seed=seed) for prompt in prompts]
        found = [parse_scores(answer.text) for answer in (yield asks)]
        again = [i for i, pair in enumerate(found) if pair is None]
        if again:
            retries = [
                Ask("judge", prompts[i], None, 0.7, self.max_tokens, seed + 1) for i in again
            ]
            for i, answer in zip(again, (yield retries), strict=True):
                found[i] = parse_scores(answer.text)
        ahead, behind = found
        if ahead is None or behind is None:
            return None
        return [ahead[0], behind[1]], [ahead[1], behind[0]]


class Likelihood(Judge):
    """Scores an answer by its mean log-likelihood a token under the judge's model."""

    scores: ClassVar[bool] = True

    name: str = "likelihood"

    def compare(
        self, instruction: str, strong: str, student: str, seed: int
    ) -> Generator[list[Ask], list[Answer], Scores | None]:
        """None where an answer does not fit the context."""
        texts = dict.fromkeys((strong, student))
        asks = [Ask("judge", instruction, given=text) for text in texts]
        found = dict(zip(texts, (yield asks), strict=True))
        values = [found[text].score for text in (strong, student)]
        if values[0] is None or values[1] is None:
            return None
        return [values[0]], [values[1]]
