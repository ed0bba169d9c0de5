"""What a selection never had to choose from, and why: numbers and the section of the report."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.scan import dead_letters
from stillhouse.pipelines.select import SelectRun
from stillhouse.pipelines.tokens import dropped_documents
from stillhouse.report.formatting import compact
from stillhouse.selection.ranking import REASONS

_FIRST_LETTERS = 10


def drops_of(made: SelectRun) -> dict[str, tuple[int | None, int | None, int | None]]:
    """What was not eligible: reason -> documents, sequences and tokens, as far as counted."""
    counts, tally = made.pool.counts, made.kept.tally
    copies = {reason: (number, None, None) for reason, number in dropped_documents(counts).items()}
    left = counts["remainder_documents"] or None, None, counts["remainder_tokens"]
    rows = {
        reason: (None, tally.fates[reason], tally.fate_tokens[reason])
        for reason in REASONS[1:]
        if tally.fates[reason]
    }
    return {**copies, "left over at the end of a part": left, **rows}


def takedown_numbers(made: SelectRun) -> dict[str, Any] | None:
    """What `exclude` lists and finds by kind of list, and the documents with such a text."""
    taken = made.candidates.takedown
    if taken is None:
        return None
    lists = {k: {"listed": n, "found": taken.found[k]} for k, n in taken.listed.items()}
    return lists | {"num_documents": taken.num_documents}


def benchmark_rows(made: SelectRun) -> dict[str, int]:
    """Rows that share text with each file of the benchmarks."""
    counts = made.kept.tally.benchmarks
    return {uri: counts[str(number)] for number, uri in enumerate(made.benchmarks, 1)}


def _listed(made: SelectRun) -> list[b.Block]:
    """How much of the lists was found, and what shares text with which benchmark."""
    blocks: list[b.Block] = []
    taken, grain = made.candidates.takedown, made.kept.manifest.settings["grain"]
    if taken is not None:
        columns = {"List": "text", "entries": "compact", "in the pool": "compact"}
        rows: list[list[b.Cell]] = [
            [f"exclude.{kind}", number, taken.found[kind]] for kind, number in taken.listed.items()
        ]
        note = f"{taken.num_documents:,} documents of the pool have such a text, copies included."
        blocks.append(_counts("Taken down", columns, rows, note))
    if made.benchmarks:
        rows = [[uri, number] for uri, number in benchmark_rows(made).items()]
        note = f"{grain.capitalize()} that share text with several files count for one of them."
        columns = {"Benchmark": "text", grain: "compact"}
        blocks.append(_counts("Contaminated with benchmarks", columns, rows, note))
    return blocks


def _counts(title: str, columns: dict[str, str], rows: list[list[b.Cell]], note: str) -> b.Block:
    return b.Group([b.Table(columns, rows, style="short"), b.Text(note, "note")], title)


def left_out(
    ctx: Context, made: SelectRun, drops: Mapping[str, Sequence[int | None]]
) -> list[b.Block]:
    columns = {"Reason": "text", "documents": "compact", "sequences": "compact"}
    columns |= {"tokens": "compact"}
    rows: list[list[b.Cell]] = [[name, *drop] for name, drop in drops.items()]
    blocks: list[b.Block] = [
        b.Text("Never eligible, whatever the score."),
        b.Table(columns, rows, style="short"),
    ]
    blocks += _listed(made)
    if unread := sum(scanned.num_dead for scanned in made.scanned.all):
        found = (row for one in made.scanned.all for row in dead_letters(ctx.store, one))
        keys = {"reason": "text", "file": "code", "row": "compact", "preview": "text"}
        first = [[row[key] for key in keys] for row in islice(found, _FIRST_LETTERS)]
        note = b.Text(f"{unread:,} in all; every one is listed in the run's artifacts.", "note")
        blocks.append(
            b.Group([b.Table(keys, first), note], f"{compact(unread)} input rows could not be read")
        )
    return blocks
