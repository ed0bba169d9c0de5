"""The sections of a report on CodecLM: rounds and gaps, what the data are about, examples."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

import stillhouse.report.blocks as b
from stillhouse.generation.asking import Item

_MAX_SHOWN = 12


def rounds_shown(
    rounds: Mapping[int, Counter[str]], gaps: Sequence[float], theta: float | None
) -> list[b.Block]:
    """A table of the rounds and a histogram of the gaps.

    Args:
        rounds: `entering`, `judged`, `kept`, and kept ones by who answered, by round.
    """
    rows: list[list[b.Cell]] = [
        [str(n), row["entering"], row["judged"], row["kept"], row["strong"], row["student"]]
        for n, row in sorted(rounds.items())
    ]
    columns = {"Round": "text", "entering": "number", "judged": "number", "kept": "number"}
    columns |= {"strong": "number", "student": "number"}
    if not gaps or theta is None:
        return []
    size = max(abs(gap) for gap in gaps) or 1.0
    edges = np.linspace(-size, size, 41)
    inside = [gap for gap in gaps if abs(gap) > theta]
    counts = [np.histogram(values, edges)[0].tolist() for values in (gaps, inside)]
    intro = (
        "An instruction is kept where the scores of the two answers are further apart than "
        f"theta = {theta:,.3g}, with the answer that scores more; the others are made harder."
    )
    chart = b.Histogram(
        "The gaps, [pool: all] and [kept: large enough]",
        edges.tolist(),
        counts[0],
        counts[1],
        None,
        " of the strong model's answer less that of the student's",
        "instructions",
    )
    return [b.Text(intro), b.Table(columns, rows, style="short", terminal=True), chart]


def coverage(
    described: Sequence[Item], entries: Sequence[Item], kept: Sequence[Item]
) -> list[b.Block]:
    """The commonest use cases and skills among seeds and among what is kept."""
    tables: list[b.Block] = []
    for title, of in (
        ("use case", lambda one: [one["use_case"]]),
        ("skill", lambda one: one["skills"]),
    ):
        before, after = (
            Counter(name for one in items for name in of(one)) for items in (described, kept)
        )
        rows: list[list[b.Cell]] = [
            [name, before[name], count] for name, count in after.most_common()
        ]
        rows += [[name, count, 0] for name, count in before.most_common() if name not in after]
        columns = {title.capitalize(): "text", "seeds": "number", "kept": "number"}
        found = len([name for name in before if name in after])
        caption = f"{found} of {len(before)} {title}s of the seeds are among what is kept"
        tables.append(b.Table(columns, rows, caption, style="short", shown=_MAX_SHOWN))
    intro = f"{len(entries):,} entries, each a use case with skills, of any two seeds."
    return [b.Text(intro), b.Group(tables)]


def examples(kept: Sequence[Item]) -> list[b.Block]:
    """The largest gaps of both signs, with their histories."""
    found = sorted(kept, key=lambda one: -one["gap"])
    groups = [
        ("The strong model is furthest ahead", found[:4]),
        ("The student is furthest ahead", [one for one in found[::-1] if one["gap"] < 0][:4]),
        ("After the most rewrites", sorted(kept, key=lambda one: -one["round"])[:4]),
    ]
    return [
        b.Cards(title, [_card(one) for one in items], "kept") for title, items in groups if items
    ]


def _card(one: Item) -> b.Card:
    facts = [
        b.Fact("answered by", one["answered_by"]),
        b.Fact("use case", one["use_case"]),
        b.Fact("skills", ", ".join(one["skills"])),
    ]
    for number, step in enumerate(one["history"], 1):
        facts.append(b.Fact(f"round {number}", f"gap {step['gap']:+.3g}", step["instruction"]))
        facts.append(b.Fact("then", step["action"]))
    text = f"{one['instruction']}\n\n{one['response']}"
    return b.Card(f"{one['gap']:+.3g}", f"round {one['round']}", text, facts)
