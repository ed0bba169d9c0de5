"""The result of a train job: its numbers, and the sections of its report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.results import assemble, automatic, cost_numbers, heldout_halves
from stillhouse.pipelines.tokens import dropped_documents
from stillhouse.pipelines.train import TrainRun
from stillhouse.report.formatting import compact, decimals, percent
from stillhouse.report.health import left_out, split_answers, unfinished
from stillhouse.training.mixture import Mixture, ScheduledMixture
from stillhouse.training.order import SampleOrder
from stillhouse.training.spec import TrainSpec

_TOTALS = ("final_loss", "num_tokens", "num_steps", "order_sha256")
_MEASURED = ("tokens_per_second", "data_wait_share", "mfu")
_MOST_WAIT = 0.05
_NUM_NAMED = 6
"""Sources with a colour and a name in the legend."""
_SHOWN_SOURCES = 12
_MOST_STRETCHES = 400
"""Points of a chart of shares."""
CHECKED = "Waiting for data, memory, and a loss that was still falling steeply were checked."


def train_result(ctx: Context, spec: TrainSpec, made: TrainRun, run_uri: str) -> b.Result:
    """The numbers of `run --json`, and the blocks of the report."""
    totals, settings = made.model.totals, made.task.settings
    measured, heldout = totals["measured"], totals["curve"]
    counts = sum((one.counts for one in made.packed), Counter[str]())
    drawn = _drawn(made)
    numbers = {
        "model_fingerprint": made.model.fingerprint,
        "train": {
            **{key: totals[key] for key in _TOTALS},
            **{key: measured[key] for key in _MEASURED},
            "heldout_nll": heldout[-1][1] if heldout else None,
            "heldout_halves": heldout_halves([totals]),
            "bits_per_byte": totals["evaluations"][-1].get("bits_per_byte"),
            "learning_rate": settings.peak_rate,
            "global_batch": settings.batch_size,
            "restarts": len(measured["starts"]) - 1,
            "sources": totals["evaluations"][-1]["heldout"],
            "data": [asdict(one) for one in drawn],
        },
        "cost": cost_numbers(ctx.work),
    }
    each = settings.batch_size * made.task.sequence_length
    starts = [[one["step"] * each, one["workers"]] for one in measured["starts"]]
    marks = [tokens for tokens, _ in starts[1:]]
    masked = made.task.mask_id is not None
    return assemble(
        ctx,
        spec,
        spec.job,
        run_uri,
        title="Training",
        artifacts={
            "model": ctx.store.path("models", made.model.fingerprint),
            "tokenizer": made.tokenizer.path,
        },
        numbers=numbers,
        warnings=b.Warnings(
            [
                *training_warnings(totals, made.task.label, automatic(spec.train)),
                *left_out(made.num_dead, dropped_documents(counts)),
                *split_answers(counts),
            ],
            CHECKED,
        ),
        lead=_lead(totals, masked),
        sections=[
            b.Section("learning", "How it learned", _learning(totals, marks, masked)),
            b.Section("speed", "How it ran", speed(totals["points"], starts, marks)),
            b.Section("data", "What it saw", _data(made, drawn)),
        ],
        footer=f"Losses are means over {_counted(masked)} tokens, in nats; a token's source is "
        "that of the document that owns its position.",
    )


def _counted(masked: bool) -> str:
    """The tokens that have a loss: of a masked model those that were hidden from it."""
    return "hidden" if masked else "predicted"


def training_warnings(
    totals: Mapping[str, Any], label: str, automatic: bool, rows: str = "sequences"
) -> list[b.Warn]:
    """What to look at first in a training; `automatic`: learning rate and batch were `auto`."""
    measured = totals["measured"]
    found = [*unfinished([(label, totals["late_fall"], automatic)])]
    if measured["data_wait_share"] > _MOST_WAIT:
        title = f"The training waited for data {measured['data_wait_share']:.0%} of its time."
        advice = "The store may be slow or far away; larger row groups or parts help."
        found.append(b.Warn(title, advice))
    if measured["halved_to"] is not None:
        title = f"The micro-batch was halved to {measured['halved_to']} {rows}."
        advice = "The device's memory did not hold more; the global batch stayed as it was."
        found.append(b.Warn(title, advice))
    return found


def _lead(totals: dict[str, Any], masked: bool) -> list[b.Block]:
    measured, heldout = totals["measured"], totals["curve"]
    restarts, workers = len(measured["starts"]) - 1, measured["starts"][-1]["workers"]
    story = (
        f"A model of {compact(totals['num_parameters'])} parameters was trained on "
        f"**{compact(totals['num_tokens'])} tokens** in {compact(totals['num_steps'])} steps"
    )
    if "num_trained" in totals:
        story += f", by adapters of {compact(totals['num_trained'])} parameters"
    tiles: list[b.Fact] = []
    if heldout:
        last, token = decimals(heldout[-1][1]), "hidden token" if masked else "token"
        story += f"; its loss on held-out text ends at **{last} nats** a {token}"
        tiles.append(b.Fact("Held-out loss", last, f"nats per {token}", main=True))
    if restarts:
        times = "once" if restarts == 1 else f"{restarts} times"
        story += f". It was restarted {times}, each time from its last checkpoint"
    mfu = "" if measured["mfu"] is None else f", MFU {percent(measured['mfu'])}"
    people = "worker" if workers == 1 else "workers"
    tiles += [
        b.Fact("Training loss", decimals(totals["points"][-1]["loss"]), "at the end"),
        b.Fact("Throughput", compact(measured["tokens_per_second"]), f"tokens a second{mfu}"),
        b.Fact("Waiting for data", percent(measured["data_wait_share"]), "of the time"),
        b.Fact("Restarts", f"{restarts}", f"{workers} {people} at the end"),
    ]
    return [b.Text(f"{story}.", "story", terminal=True), b.Facts(tiles, terminal=True)]


def _learning(totals: dict[str, Any], marks: list[float], masked: bool) -> list[b.Block]:
    heldout = totals["curve"]
    curves = {"trained on": [[(one["tokens"], one["loss"]) for one in totals["points"]]]}
    curves |= {"held out": [[(tokens, nll) for tokens, nll in heldout]]} if heldout else {}
    caption = "Held out, and as trained on" if heldout else "As trained on"
    charts = [b.Curves(caption, curves, "held out", y_title="loss", marks=marks)]
    sources = _sources(totals["evaluations"])
    kind = "heldout" if sum(bool(found["heldout"]) for found in sources.values()) > 1 else "trained"
    compared = {name: [found[kind]] for name, found in sources.items() if found[kind]}
    if len(compared) > 1:
        caption = f"Each source, {'held out' if kind == 'heldout' else 'as trained on'}"
        if len(compared) > _NUM_NAMED:
            caption += f"; the {_NUM_NAMED} largest of {len(compared)} have their names"
        charts.append(
            b.Curves(caption, compared, y_title="loss", marks=marks, num_named=_NUM_NAMED)
        )
    intro = f"Losses are means over {_counted(masked)} tokens, in nats; lower is better."
    intro += " A [restart: thin line] marks each restart." if marks else ""

    def last_of(points: b.Points) -> float | None:
        return points[-1][1] if points else None

    measured = totals["evaluations"][-1]["heldout"]
    bits = {name: loss.get("bits_per_byte") for name, loss in measured.items()}
    columns = {"Source": "text", "held out": "decimals3"}
    columns |= {} if masked else {"bits per byte": "decimals3"}  # which are of a whole text
    rows: list[list[b.Cell]] = [
        [
            name,
            last_of(by["heldout"]),
            *([] if masked else [bits.get(name)]),
            last_of(by["trained"]),
        ]
        for name, by in sources.items()
    ]
    last = b.Table(
        columns | {"trained on": "decimals3"},
        rows,
        caption="By source, at the end",
        style="short",
        shown=_SHOWN_SOURCES,
    )
    return [b.Text(intro), b.Group([*charts]), *([last] if sources else [])]


def _sources(evaluations: Sequence[dict[str, Any]]) -> dict[str, dict[str, b.Points]]:
    """Curves by source, `heldout` and `trained`; held-out sources first, then by tokens."""
    found: dict[str, dict[str, b.Points]] = {}
    tokens: dict[str, int] = {}
    for one in evaluations:
        for kind in ("heldout", "trained"):
            for name, loss in one[kind].items():
                curves = found.setdefault(name, {"heldout": [], "trained": []})
                curves[kind].append((one["tokens"], loss["nll"]))
                tokens[name] = tokens.get(name, 0) + loss["num_tokens"]
    order = sorted(found, key=lambda name: (not found[name]["heldout"], -tokens[name], name))
    return {name: found[name] for name in order}


def speed(
    points: Sequence[dict[str, Any]],
    starts: list[list[int]],
    marks: list[float],
    units: str = "tokens",
) -> list[b.Block]:
    """Throughput in `units` a second, waiting, and the starts: units before, and workers."""

    def lines(caption: str, name: str, values: Sequence[float], y_title: str) -> b.Curves:
        curve = [(one["tokens"], value) for one, value in zip(points, values, strict=True)]
        return b.Curves(
            caption,
            {name: [curve]},
            name,
            x_title=f"{units} trained on",
            y_title=y_title,
            marks=marks,
            from_zero=True,
        )

    rates = [one["tokens_per_s"] for one in points]
    waiting = [100 * one["data_wait_share"] for one in points]
    charts: list[b.Block] = [
        lines(f"{units.title()} a second, all workers", f"{units}/s", rates, f"{units} a second"),
        lines("Waiting for data", "waiting", waiting, "percent of the time"),
    ]
    columns, caption = {f"After {units}": "compact", "workers": "compact"}, "Every start"
    every = b.Table(columns, [[*row] for row in starts], caption, style="short")
    return [b.Group(charts), *([every] if marks else [])]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A data set's shares of the sequences, asked for on average and drawn, and its epochs.

    `exhausted_at` is the step at which it was left out for `max_epochs`; None: it was not.
    """

    name: str
    asked: float
    drawn: float
    epochs: float
    exhausted_at: int | None = None


def _drawn(made: TrainRun) -> list[_Drawn]:
    task, whole = made.task, made.task.num_steps * made.task.settings.batch_size
    if len(task.data) == 1:
        return [_Drawn(task.data[0].name, 1.0, 1.0, whole / task.data[0].num_rows)]
    order = task.order()
    found: list[_Drawn] = []
    for i, (one, asked) in enumerate(zip(task.data, order.mixture.asked, strict=True)):
        rows = sum(order.num_drawn(i, task.num_steps))
        ended = _exhausted_at(order, i, one.share.limit)
        found.append(_Drawn(one.name, asked, rows / whole, rows / one.num_rows, ended))
    return found


def _exhausted_at(order: SampleOrder, dataset: int, epochs: float | None) -> int | None:
    """The step from which a data set of so many epochs is not drawn any more."""
    limit = order.limit(dataset, epochs)
    if limit is None or not isinstance(order.mixture, ScheduledMixture):
        return None
    plan = order.mixture.plan
    last = int(plan.shares[:, dataset].nonzero()[0].max(initial=-1))
    if last + 1 == len(plan.shares) or plan.counts[-1, dataset] < limit - 1:  # of rounding
        return None
    return int(plan.starts[last + 1]) // order.rows_per_lane


def _data(made: TrainRun, drawn: Sequence[_Drawn]) -> list[b.Block]:
    settings, totals, data = made.task.settings, made.model.totals, made.task.data
    mixed = len(data) > 1
    columns = {"Data": "text"}
    columns |= {"share asked for": "percent", "drawn": "percent"} if mixed else {}
    columns |= {"sequences": "compact", "epochs": "decimals2"}
    rows: list[list[b.Cell]] = []
    for one, source in zip(drawn, data, strict=True):
        shares: list[b.Cell] = [one.asked, one.drawn] if mixed else []
        rows.append([one.name, *shares, source.num_rows, one.epochs])
    intro = (
        f"Batches of {compact(settings.batch_size)} sequences of "
        f"{compact(made.task.sequence_length)} tokens, at a learning rate of "
        f"{settings.peak_rate:.2g} at its peak, in an order that does not depend on the number of "
        "workers."
    )
    digest = f"SHA-256 over all samples in order: `{totals['order_sha256']}`"
    table = b.Table(columns, rows, style="short")
    ended = [
        b.Text(
            f"`{one.name}` was exhausted at step {one.exhausted_at:,} of {made.task.num_steps:,}, "
            f"after {one.epochs:.3g} epochs: from there on the others shared its draws."
        )
        for one in drawn
        if one.exhausted_at is not None
    ]
    return [b.Text(intro), *_shares(made), table, *ended, b.Text(digest, "note")]


def _shares(made: TrainRun) -> list[b.Block]:
    """The shares over the training, where they change."""
    task = made.task
    order = task.order()
    if isinstance(order.mixture, Mixture):
        return []
    plan, curves = order.mixture.plan, dict[str, list[b.Points]]()
    each = task.step_units // order.rows_per_lane
    every = -(-len(plan.shares) // _MOST_STRETCHES)
    for i, one in enumerate(task.data):
        points: dict[float, float] = {}
        for stretch in range(0, len(plan.shares), every):
            start, end = plan.starts[[stretch, stretch + 1]].tolist()
            points |= dict.fromkeys((start * each, (end - 1) * each), plan.shares[stretch, i])
        name = one.name if one.name not in curves else f"{one.name} ({i + 1})"
        curves[name] = [[(x, 100 * share) for x, share in points.items()]]
    caption = "What the batches were drawn from"
    if len(curves) > _NUM_NAMED:
        caption += f"; the first {_NUM_NAMED} of {len(curves)} have their names"
    return [
        b.Curves(
            caption,
            curves,
            y_title="percent of the sequences",
            settled_from=0.0,
            from_zero=True,
            num_named=_NUM_NAMED,
        )
    ]
