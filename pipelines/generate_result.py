"""The result of a generation: its numbers, and the sections of its report."""

from collections.abc import Mapping
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.generation.spec import GenerateSpec
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.generate import GENERATED, GenerateRun
from stillhouse.pipelines.results import assemble, cost_numbers
from stillhouse.report.formatting import compact, percent, words

_CHECKED = "Too few rows, equal models and the number of dropped items were checked."
_MANY_DROPPED = 0.5


def generate_result(ctx: Context, spec: GenerateSpec, made: GenerateRun, run_uri: str) -> b.Result:
    """The result of a finished generation."""
    rows, spent = made.manifest.num_rows, _by_role(spec, made)
    calls = _sum(spent, "calls")
    needed = made.counts["calls"] + made.counts["cached_calls"]
    numbers: dict[str, Any] = {
        "generated_fingerprint": made.manifest.fingerprint,
        "generate": {
            "num_pairs": rows,
            "seeds": made.num_seeds,
            "calls": calls,
            "cached_calls": max(0, needed - calls),
            "tokens": _sum(spent, "prompt_tokens") + _sum(spent, "completion_tokens"),
            "rounds": made.made.rounds,
            "dropped": dict(made.dropped.most_common()),
            "models": spent,
            **made.made.numbers,
        },
        "cost": {"device_seconds": cost_numbers(ctx.work)["device_seconds"]},
    }
    price = _price(spec, spent)
    if price is not None:
        numbers["generate"]["price"] = {"calls": price, "pair": price / rows}
    dropped: list[list[b.Cell]] = [[why, count] for why, count in made.dropped.most_common()]
    table = b.Table({"Reason": "text", "items": "number"}, dropped, style="short")
    return assemble(
        ctx,
        spec,
        spec.job,
        run_uri,
        title="Generated data",
        artifacts={GENERATED: ctx.store.path(GENERATED, made.manifest.fingerprint)},
        numbers=numbers,
        warnings=b.Warnings(_warnings(spec, made), _CHECKED),
        lead=_lead(spec, made, spent, price),
        sections=[
            *made.made.sections,
            b.Section("dropped", "What was left out", [table] if dropped else []),
        ],
        cost=_calls(spent, price),
    )


Spent = Mapping[str, Mapping[str, int]]
"""By role: calls, prompt_tokens, completion_tokens; in all runs of the job."""


def _by_role(spec: GenerateSpec, made: GenerateRun) -> dict[str, dict[str, int]]:
    nothing = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
    return {role: nothing | made.spent.get(role, {}) for role in spec.models}


def _sum(spent: Spent, key: str) -> int:
    return sum(one[key] for one in spent.values())


def _price(spec: GenerateSpec, spent: Spent) -> float | None:
    """Of the calls of endpoints; None without prices."""
    if spec.prices is None:
        return None
    asked = [spent[role] for role, one in spec.models.items() if one.endpoint is not None]
    return sum(
        spec.prices.of_calls(one["prompt_tokens"], one["completion_tokens"]) for one in asked
    )


def _lead(
    spec: GenerateSpec, made: GenerateRun, spent: Spent, price: float | None
) -> list[b.Block]:
    rows, calls = made.manifest.num_rows, _sum(spent, "calls")
    story = (
        f"**{compact(rows)} rows** were generated from {compact(made.num_seeds)} seeds by "
        f"`{spec.generation.name}`, in {compact(calls)} calls of models."
    )
    total = _sum(spent, "completion_tokens")
    left_out = made.dropped.total()
    tiles = [
        b.Fact("Rows", compact(rows), "delivered", main=True),
        b.Fact("Calls", compact(calls), f"{calls / rows:,.1f} a row"),
        b.Fact("Tokens written", compact(total), f"{total / rows:,.0f} a row"),
        b.Fact("Left out", compact(left_out), f"{percent(left_out / (left_out + rows))} of all"),
    ]
    ratio = made.made.numbers.get("recovery_ratio")
    if ratio is not None:
        note = "where the student's answer is no worse, of the first ones"
        tiles.append(b.Fact("Recovery ratio", percent(ratio), note))
    if price is not None:
        tiles.append(b.Fact("Price", f"{price:,.2f}", f"{price / rows:,.4f} a row"))
    return [b.Text(story, "story", terminal=True), b.Facts(tiles, terminal=True)]


def _calls(spent: Spent, price: float | None) -> list[b.Block]:
    rows: list[list[b.Cell]] = [[words(role), *one.values()] for role, one in spent.items()]
    columns = {"Model": "text", "calls": "number", "tokens read": "compact"}
    caption = "Calls by model, in all runs of the job"
    table = b.Table(columns | {"written": "compact"}, rows, caption, style="short")
    if price is None:
        return [table]
    text = f"At the spec's `prices` the calls of endpoints cost **{price:,.2f}**."
    return [b.Text(text), table]


def _warnings(spec: GenerateSpec, made: GenerateRun) -> list[b.Warn]:
    warnings = [b.Warn(text) for text in made.warnings]
    rows, wanted = made.manifest.num_rows, spec.generation.num_pairs
    if rows < wanted and not warnings:
        warnings.append(b.Warn(f"Only {rows:,} of {wanted:,} rows: give more seeds."))
    if made.identical:
        warnings.append(
            b.Warn(
                "The strong model and the student are one model: the gap between them is noise.",
                "Give a stronger model by `strong`.",
            )
        )
    total = made.dropped.total()
    if total > _MANY_DROPPED * (total + made.manifest.num_rows):
        [(reason, count)] = made.dropped.most_common(1)
        warnings.append(
            b.Warn(
                f"More was left out than kept: {count:,} times because of: {reason}.",
                "Look at the table of what was left out, and at some drafts.",
            )
        )
    return warnings
