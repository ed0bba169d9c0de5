"""CodecLM (Wang et al. 2024, arXiv 2404.05875): data for a target, of what the student lacks.

    encode     of each seed: a use case, and the skills that an answer needs
    mix        use cases and skills of any two seeds: `num_metadata` entries
    write      equally many instructions for each entry
    judge      both models answer; scores S of 1 to 10, in both orders; G = S(strong) - S(student)
    keep       |G| > theta: with the strong model's answer if G > 0, with the student's if G < 0
    rewrite    the others: four rubrics of an entry, with an action each, say what makes such
               instructions hard; one action, drawn, is applied; then judge again

The basic instruction is the first of `iterations`. What is under theta after the last one is
dropped (the paper does not say). `keep` sets theta to what that share of the first gaps exceeds:
theta = 3 of the paper belongs to its judge's scale. Answers of one score are never kept. There is
no official code; the prompts are ours.

Where fewer than `num_pairs` are kept, further waves of instructions follow, at most `waves`.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

import stillhouse.report.blocks as b
from stillhouse.generation.asking import Answer, Item, Program, Role
from stillhouse.generation.codec_report import coverage, examples, rounds_shown
from stillhouse.generation.judges import Judge, Verdict, recovery_ratio, verdict
from stillhouse.generation.method import Generated, Generation, Workshop, usable
from stillhouse.generation.screening import answer_fault
from stillhouse.settings import Count, Share

ENCODE = """\
Describe the request below in general terms, without naming its topic, so that other requests of \
its kind can be written.

Request:
{instruction}

Reply with exactly two lines:
Use case: <what such a request is for, two to five words>
Skills: <at most three skills that an answer needs, of two or three words each, between commas>"""
WRITE = """\
Write one request that a user could send to an assistant.
Use case: {use_case}
An answer needs these skills: {skills}

It is complete in itself: whatever it refers to is part of it. Reply with the request alone."""
RUBRICS = """\
Requests of this kind are to be made harder.
Use case: {use_case}
An answer needs these skills: {skills}

Name {count} properties that make such a request hard to answer well, and for each one change that \
gives a request this property. Reply with {count} pairs of lines:
Rubric: <property>
Action: <change>"""
REWRITE = """\
Rewrite the request below by this change: {action}

Request:
{instruction}

The new request can be understood and answered without the old one, and is at most some sentences \
longer. Reply with the new request alone."""
_LABELS = re.compile(r"^\W*(use case|skills)\W*:\s*(.+)$", re.I | re.M)
_KEPT = 0.7
_DRAWS = 50
"""For each entry, before all pairs are listed."""
_ACTION = re.compile(r"^\W*action\W*\d*\s*:\s*(\S.*)$", re.I | re.M)


class Codec(Generation):
    """Settings of CodecLM; exactly one of `keep` and `theta`."""

    roles: ClassVar[tuple[Role, ...]] = ("strong", "student", "judge")
    columns: ClassVar[tuple[str, ...]] = (
        *("instruction", "response", "answered_by", "use_case", "skills"),
        *("round", "gap", "strong_score", "student_score"),
    )
    numeric: ClassVar[tuple[str, ...]] = ("round", "gap", "strong_score", "student_score")
    prompts: ClassVar[str] = "codec-1"

    name: str = "codec"
    iterations: Count = Field(default=4, description="the basic instruction and its rewrites")
    num_rubrics: Count = 4
    num_metadata: Count = Field(default=200, description="pairs of use case and skills")
    keep: Annotated[Share, Field(gt=0)] | None = Field(
        default=None, description="share of the basic instructions whose gap is large enough"
    )
    theta: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="gap to exceed, on the judge's scale"
    )
    waves: Count = Field(default=3, description="of instructions, until `num_pairs` are kept")

    @model_validator(mode="after")
    def _one_of(self) -> "Codec":
        if (self.keep is None) == (self.theta is None):
            raise ValueError("give exactly one of `keep` and `theta`")
        return self

    def make(self, workshop: Workshop, seeds: Sequence[Item]) -> Generated:
        loop = _Loop(self, workshop)
        described = workshop.run("encode", "encode", seeds)
        described = usable(workshop, described)
        entries = mixed(described, self.num_metadata, self.seed)
        for _ in range(self.waves if entries else 0):
            loop.wave(entries)
            if len(loop.kept) >= self.num_pairs:
                break
        return loop.result(entries, described)

    def encode(self, seed: Item, judge: Judge) -> Program:
        """The use case and skills of a seed."""
        return (yield from describe(self, seed))

    def write(self, item: Item, judge: Judge) -> Program:
        """A basic instruction for an entry."""
        prompt = WRITE.format(**_described(item))
        [answer] = yield [self.writing(prompt, item["draw"])]
        return item | {"instruction": answer.text, "fault": answer_fault(answer), "round": 1}

    def rewrite(self, item: Item, judge: Judge) -> Program:
        """The instruction after one of the actions of its entry, drawn by seed, item and round."""
        prompt = RUBRICS.format(count=self.num_rubrics, **_described(item))
        actions: list[str] = []
        for again in range(2):
            [answer] = yield [self.writing(prompt, self.seed + again)]
            actions = _ACTION.findall(answer.text)[: self.num_rubrics]
            if actions:
                break
        if not actions:
            return item | {"fault": "rubrics that cannot be read"}
        number = item["round"] + 1
        draws = np.random.default_rng([self.seed, item["draw"], number])
        action = actions[int(draws.integers(len(actions)))]
        prompt = REWRITE.format(action=action, instruction=item["instruction"])
        [answer] = yield [self.writing(prompt, item["draw"])]
        step = {"instruction": item["instruction"], "gap": item["gap"], "action": action}
        return item | {
            "instruction": answer.text,
            "fault": answer_fault(answer),
            "round": number,
            "history": [*item["history"], step],
        }

    def answer(self, item: Item, judge: Judge) -> Program:
        """Both models' answers, their scores and the gap."""
        strong, student = yield [
            self.answering(item["instruction"], role) for role in ("strong", "student")
        ]
        fault = answer_fault(strong)
        if fault or student.fault:
            return item | {"fault": fault or "student: " + student.fault}
        scores = yield from judge.compare(item["instruction"], strong.text, student.text, self.seed)
        if scores is None:
            return item | {"fault": "scores that cannot be read"}
        means = [float(np.mean(one)) for one in scores]
        gap = means[0] - means[1]
        by = "strong" if gap > 0 else "student"
        return item | {
            "response": (strong if gap > 0 else student).text,
            "answered_by": by,
            "response_fault": "" if gap > 0 else answer_fault(student),
            "strong_score": means[0],
            "student_score": means[1],
            "orders": scores,
            "gap": gap,
            "fault": "",
        }

    def calls(self, num_seeds: int) -> dict[str, int]:
        """Of one wave, where `keep`, or the paper's 0.7, of the instructions are kept each time."""
        entries, left = min(self.num_metadata, num_seeds**2), self.num_pairs
        found = {"encode": num_seeds, "write": left}
        for number in range(1, self.iterations + 1):
            if number > 1:
                left = math.ceil(left * (1 - (self.keep or _KEPT)))
                found[f"rewrite {number}"] = left + (min(entries, left) if number == 2 else 0)
            found[f"judge {number}"] = 4 * left
        return found


def describe(method: Generation, seed: Item) -> Program:
    """The use case and skills of a seed by the strong model, asked for once more if they cannot be
    read; a fault if they still cannot.
    """
    prompt, said = ENCODE.format(instruction=seed["instruction"]), Answer()
    for again in range(2):
        [said] = yield [method.writing(prompt, method.seed + again)]
        found = parse_metadata(said.text)
        if found.get("use_case") and found.get("skills"):
            return {"seed": seed["id"], "fault": "", **found}
    return {"seed": seed["id"], "fault": said.fault or "seed without metadata"}


def parse_metadata(text: str) -> dict[str, Any]:
    """`use_case` and `skills` of what a model said, in lower case; a missing one is absent.

    >>> parse_metadata("Use case: Story writing\\nSkills: Planning, dialogue")
    {'use_case': 'story writing', 'skills': ['planning', 'dialogue']}
    """
    found: dict[str, Any] = {}
    for label, value in _LABELS.findall(text):
        if label.lower() == "skills":
            skills = [one.strip().lower().rstrip(".") for one in value.split(",")]
            found["skills"] = [one for one in skills if one]
        else:
            found["use_case"] = value.strip().lower().rstrip(".")
    return found


def mixed(described: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Entries of the use case of one seed and the skills of one, as often as seeds have them.

    Each pair once; where there are fewer than `count`, all of them.
    """
    skills = [tuple(one["skills"][:3]) for one in described]
    if not described:
        return []
    total = len({one["use_case"] for one in described}) * len({*skills})
    draws, found = np.random.default_rng([seed, 1]), dict[tuple[str, tuple[str, ...]], None]()
    for i, j in draws.integers(len(described), size=(_DRAWS * count, 2)).tolist():
        found.setdefault((described[i]["use_case"], skills[j]))
        if len(found) >= min(count, total):
            break
    else:  # rare ones are left
        for pair in product(sorted({one["use_case"] for one in described}), sorted({*skills})):
            found.setdefault(pair)
    return [{"use_case": use, "skills": [*names]} for use, names in [*found][:count]]


def theta_of(gaps: Sequence[float], keep: float) -> float:
    """The largest size of a gap that the share `keep` of the gaps, or more if some tie, exceeds."""
    sizes = sorted((abs(gap) for gap in gaps), reverse=True)
    least = sizes[max(0, math.floor(keep * len(sizes)) - 1)]
    return next((size for size in sizes if size < least), 0.0)


def _described(item: Item) -> dict[str, str]:
    return {"use_case": item["use_case"], "skills": ", ".join(item["skills"])}


class _Loop:
    """The waves of one generation."""

    def __init__(self, method: Codec, workshop: Workshop) -> None:
        self._method, self._shop = method, workshop
        self.theta = method.theta
        self.kept: list[Item] = []
        self._rounds: dict[int, Counter[str]] = {}
        self._gaps: list[float] = []
        self._verdicts: list[Verdict] = []
        self._begun = 0

    def wave(self, entries: Sequence[Item]) -> None:
        """Begin as many instructions as are missing, and take them through all iterations."""
        items = self._begin(entries)
        written = usable(self._shop, self._shop.run("write", "write", items))
        items = self._shop.screened(written, "instruction")
        for iteration in range(1, self._method.iterations + 1):
            if iteration > 1:
                rewritten = self._shop.run(f"rewrite {iteration}", "rewrite", items)
                items = self._shop.screened(usable(self._shop, rewritten), "instruction")
            judged = self._shop.run(f"judge {iteration}", "answer", items)
            items = self._keep(iteration, len(items), usable(self._shop, judged))
            if not items:
                break
        self._shop.drop("gap below theta after the last iteration", items)

    def _begin(self, entries: Sequence[Item]) -> list[Item]:
        """Items of the entries in turn; more than are missing, as far as earlier waves tell."""
        missing = self._method.num_pairs - len(self.kept)
        if self._begun:
            share = max(len(self.kept) / self._begun, 0.1)
            missing = min(math.ceil(missing / share), self._method.num_pairs)
        first, self._begun = self._begun, self._begun + missing
        return [
            entries[i % len(entries)] | {"draw": self._method.seed_of(i), "history": []}
            for i in range(first, first + missing)
        ]

    def _keep(self, iteration: int, entering: int, judged: list[Item]) -> list[Item]:
        """Keep what has a gap above theta; the others."""
        self._gaps += [one["gap"] for one in judged]
        self._verdicts.extend(verdict(one["orders"]) for one in judged if iteration == 1)
        if self.theta is None and judged:
            assert self._method.keep is not None
            self.theta = theta_of([one["gap"] for one in judged], self._method.keep)
        theta = self.theta or 0.0
        chosen = [one for one in judged if abs(one["gap"]) > theta]
        others = [one for one in judged if abs(one["gap"]) <= theta]
        chosen = usable(self._shop, chosen, "response_fault")
        chosen = self._shop.screened(chosen, "response")
        self._shop.delivered(chosen, "instruction")
        self.kept += chosen
        row = self._rounds.setdefault(iteration, Counter())
        row.update(entering=entering, judged=len(judged), kept=len(chosen))
        row.update(one["answered_by"] for one in chosen)
        return others

    def result(self, entries: Sequence[Item], described: Sequence[Item]) -> Generated:
        method = self._method
        kept = self.kept[: method.num_pairs]
        self._shop.drop("more than `num_pairs`", self.kept[method.num_pairs :])
        if kept and len(kept) < method.num_pairs:
            self._shop.warn(
                f"Only {len(kept):,} of {method.num_pairs:,} pairs after {method.waves} waves of "
                "instructions: add seeds, lower `theta`, or raise `keep`, `iterations` or `waves`."
            )
        rounds = Counter(one["round"] for one in kept)
        delivered = [rounds[number] for number in range(1, method.iterations + 1)]
        numbers = {
            "theta": self.theta,
            "recovery_ratio": recovery_ratio(self._verdicts),
            "metadata": len(entries),
            "answered_by": dict(sorted(Counter(one["answered_by"] for one in kept).items())),
        }
        blocks = rounds_shown(self._rounds, self._gaps, self.theta)
        sections = [
            b.Section("rounds", "From round to round", blocks),
            b.Section("metadata", "What the data are about", coverage(described, entries, kept)),
            b.Section("examples", "Read some", examples(kept)),
        ]
        return Generated(kept, delivered, numbers, sections)
