"""The result of a mix job: its numbers, and the sections of its report."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stillhouse.report.blocks as b
from stillhouse.mixing.decisions import Decision, log_parts, read_decisions
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.mix import MixRun, Rule
from stillhouse.pipelines.mix_data import row_fates
from stillhouse.pipelines.results import assemble, mean_std, plus_minus
from stillhouse.report.formatting import words

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Totals of the trainings of each policy, by seed."""
Logs = Sequence[Sequence[Decision]]
"""The decisions of a policy, by seed."""
_MEASURED = ("gradient_passes", "num_steps", "draws", "decisions_sha256")
_BINS = 120
_ENTROPY_BINS = 20
_MOST_DRAWN = 5
_NEARLY_ALL = 0.95
_CHECKED = (
    "Rewards that could not be used, an accuracy that a guess would have, weights on one arm, "
    "baselines without steps, rows that were cut and arms that were left out were checked."
)


def mix_result(ctx: Context, spec: MixSpec, made: MixRun, run_uri: str) -> b.Result:
    runs = {label: {str(seed): m for seed, m in of.items()} for label, of in made.models.items()}
    totals = {label: [m.totals for m in of.values()] for label, of in made.models.items()}
    main = made.rules[0].label
    best = min(made.models[main].values(), key=lambda m: m.totals["test"]["nll"])
    names, counts = [part.name for part in made.arms.arms], row_fates(made.arms)
    logs = {
        label: [read_decisions(log_parts(one["log"]))[0] for one in of]
        for label, of in totals.items()
        if any(any(one["draws"].values()) for one in of)
    }
    numbers = {
        "model_fingerprint": best.fingerprint,
        "mix": {
            label: {"seeds": {seed: _measured(m.totals) for seed, m in of.items()}}
            for label, of in runs.items()
        },
        "rows": counts,
        "skipped_arms": made.arms.skipped,
    }
    rows = b.Table(
        {"What": "text", "rows": "compact"}, [[*row] for row in counts.items()], style="short"
    )
    return assemble(
        ctx,
        spec,
        spec.job,
        run_uri,
        title="Mixing for a few-shot target",
        artifacts={
            "tokenizer": made.arms.tokenizer.path,
            "models": {
                label: {seed: ctx.store.path("models", m.fingerprint) for seed, m in of.items()}
                for label, of in runs.items()
            },
            "decisions": {
                label: {seed: m.totals["log"] for seed, m in of.items()}
                for label, of in runs.items()
            },
        },
        numbers=numbers,
        warnings=b.Warnings(_warnings(totals, made), _CHECKED),
        lead=_lead(spec, main, len(names), totals),
        sections=[
            b.Section("policies", "Policies and baselines", policies_section(main, totals)),
            b.Section("loss", "Target loss", _losses(main, totals)),
            b.Section("arms", "What was drawn", drawn_section(main, logs, names)),
            b.Section(
                "rewards", f"Arms under {words(main)}", arms_section(logs.get(main, ()), made)
            ),
            b.Section("rows", "Rows of the arms", [rows]),
        ],
        footer="Losses are means over the predicted tokens, in nats. A gradient pass is a forward "
        "and backward pass of one micro-batch.",
    )


def _measured(totals: Mapping[str, Any]) -> dict[str, Any]:
    test = totals["test"]
    found = {"heldout_nll": test["nll"], "accuracy_interval": test["interval"]}
    found |= {key: test[key] for key in ("accuracy", "chance")}
    best = next(row for row in totals["curve"] if row["step"] == totals["best_step"])
    found |= {key: best[key] for key in ("validation_nll", "validation_accuracy")}
    return found | {key: totals[key] for key in _MEASURED}


def _nll(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["test"]["nll"] for one in runs]


def _accuracy(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Accuracies by seed; empty for targets without choices."""
    return [one["test"]["accuracy"] for one in runs if one["test"]["accuracy"] is not None]


def _lead(spec: MixSpec, main: str, num_arms: int, totals: Runs) -> list[b.Block]:
    runs = totals[main]
    test, accuracies = runs[0]["test"], _accuracy(runs)
    best = min(totals, key=lambda label: fmean(_nll(totals[label])))
    story = (
        f"Under **{words(main)}**, {num_arms} arms were mixed for a target of "
        f"{spec.target.num_shots} shots: held-out loss {plus_minus(_nll(runs), 4)} nats a token"
    )
    if accuracies:
        story += f", accuracy {plus_minus(accuracies)}"
    if test["chance"] is not None:
        story += f" (a guess: {test['chance']:.3f})"
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    story += f", on {test['num_rows']} test rows, {seeds}."
    if best != main:
        story += f" **{words(best).capitalize()}** has the lowest loss: "
        story += f"{plus_minus(_nll(totals[best]), 4)}."
    loss = b.Fact("Held-out loss", plus_minus(_nll(runs), 4), "nats per token", main=True)
    tiles = [loss, b.Fact("Target", f"{spec.target.num_shots} shots", f"{num_arms} arms")]
    if accuracies:
        guess = "" if test["chance"] is None else f"a guess: {test['chance']:.3f}"
        tiles.insert(1, b.Fact("Accuracy", plus_minus(accuracies), guess))
    return [b.Text(story, "story", terminal=True), b.Facts(tiles)]


def policies_section(main: str, totals: Runs) -> list[b.Block]:
    rows, each = list[list[b.Cell]](), list[list[b.Cell]]()
    for label, runs in totals.items():
        accuracy = _accuracy(runs)
        passes, seconds = (
            fmean(run[key] for run in runs) for key in ("gradient_passes", "seconds")
        )
        shown = mean_std(_nll(runs)), mean_std(accuracy) if accuracy else None
        rows.append([words(label), len(runs), *shown, passes, seconds])
        for run in runs:
            test = run["test"]
            low, high = test["interval"] or (None, None)
            steps = f"{run['best_step']} of {run['num_steps']}"
            cells = [words(label), run["seed"], test["nll"], test["accuracy"], low, high]
            each.append([*cells, run["gradient_passes"], steps])
    intro = (
        "The best checkpoint by the validation half, measured on the target's test rows. All have "
        "as many gradient passes to spend, the initial pass over the arms included; early stopping "
        "spends less."
    )
    columns = {"Policy": "text", "seeds": "compact wide", "held-out loss": "decimals4"}
    columns |= {"accuracy": "decimals3", "gradient passes": "compact wide", "time": "duration wide"}
    seeds = {"Policy": "text", "seed": "compact", "held-out loss": "decimals3"}
    seeds |= {"accuracy": "decimals3", "95 % from": "decimals3 wide", "to": "decimals3 wide"}
    seeds |= {"passes": "compact wide", "best step": "text wide"}
    inside = b.Table(seeds, each, main=words(main))
    return [
        b.Text(intro),
        b.Table(columns, rows, main=words(main), terminal=True),
        b.Group([inside], "Every seed"),
    ]


def _losses(main: str, totals: Runs) -> list[b.Block]:
    def lines(key: str, caption: str, x_title: str) -> b.Curves:
        curves = {
            label: [[(float(p[key]), p["heldout_nll"]) for p in run["curve"]] for run in runs]
            for label, runs in totals.items()
        }
        return b.Curves(caption, curves, main, x_title=x_title)

    passes = "The same against gradient passes, the initial pass included."
    charts: list[b.Block] = [
        lines("step", "Held-out loss of the target against optimiser steps.", "steps"),
        lines("passes", passes, "gradient passes"),
    ]
    return [b.Group(charts)]


def drawn_section(main: str, logs: Mapping[str, Logs], names: Sequence[str]) -> list[b.Block]:
    """Shares of the arms over the run: the policy, and static alignment."""
    blocks = [
        _heat(label, logs[label], names) for label in logs if label in (main, "static_alignment")
    ]
    charts: list[b.Block] = []
    if main in logs:
        curves = _cumulative(logs[main], names)
        caption = (
            f"Cumulative draws of the arms that {words(main)} drew most: mean over seeds, and from "
            "the least to the most."
        )
        charts.append(
            b.Curves(caption, curves, next(iter(curves)), x_title="steps", y_title="draws")
        )
    if logs:
        curves = {label: [_effective(log, len(names)) for log in of] for label, of in logs.items()}
        caption = (
            "Effective number of arms: the exponential of the entropy of what was drawn, in each "
            "twentieth of the run."
        )
        charts.append(b.Curves(caption, curves, main, x_title="steps", y_title="effective arms"))
    return [*blocks, *([b.Group(charts)] if charts else [])]


def _shares(log: Sequence[Decision], num_arms: int, bins: int) -> NDArray[np.float64]:
    """Mean logged distribution of each bin of steps, else the shares of draws: [K, B]."""
    found = np.zeros((num_arms, bins))
    logged: dict[int, list[list[float]]] = {}
    for d in log:
        place = d.step * bins // (log[-1].step + 1)
        found[d.arm, place] += 1
        if d.probabilities and d.indices is None:
            logged.setdefault(place, []).append(d.probabilities)
    found /= np.maximum(found.sum(0), 1)
    for place, distributions in logged.items():
        found[:, place] = np.mean(distributions, axis=0)
    return found


def _heat(label: str, logs: Logs, names: Sequence[str]) -> b.Heat:
    steps = max(log[-1].step for log in logs) + 1
    shares = np.mean([_shares(log, len(names), min(_BINS, steps)) for log in logs], axis=0)
    order = np.argsort(-shares.sum(1), kind="stable")
    caption = f"{words(label)}: share of each arm over the run, most drawn first, mean over seeds."
    arms = [names[int(i)] for i in order]
    return b.Heat(caption, arms, np.round(shares[order], 5).tolist(), steps)


def _effective(log: Sequence[Decision], num_arms: int) -> b.Points:
    steps = log[-1].step + 1
    bins = min(_ENTROPY_BINS, steps)
    shares = _shares(log, num_arms, bins)
    effective = np.exp(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(0))
    return [((place + 1) * steps / bins, float(effective[place])) for place in range(bins)]


def _cumulative(logs: Logs, names: Sequence[str]) -> dict[str, list[b.Points]]:
    """Cumulative draws of the most drawn arms at twenty steps of the run, by seed."""
    counts = [np.bincount([d.arm for d in log], minlength=len(names)) for log in logs]
    most = np.argsort(-np.sum(counts, axis=0), kind="stable")[:_MOST_DRAWN]

    def curve(arm: int, log: Sequence[Decision]) -> b.Points:
        steps = log[-1].step + 1
        drawn = np.cumsum(np.bincount([d.step for d in log if d.arm == arm], minlength=steps))
        places = np.unique(np.linspace(1, steps, _ENTROPY_BINS).astype(int))
        return [(float(place), float(drawn[place - 1])) for place in places]

    return {names[int(arm)]: [curve(int(arm), log) for log in logs] for arm in most}


def arms_section(logs: Logs, made: MixRun) -> list[b.Block]:
    """Draws over all seeds, and mean and deviation of the rewards, most drawn first."""
    if not logs:
        return []
    arms = made.arms.arms
    draws = np.sum([np.bincount([d.arm for d in log], minlength=len(arms)) for log in logs], axis=0)
    rewards: list[list[float]] = [[] for _ in arms]
    for log in logs:
        seen = {(d.step, d.arm): d.reward for d in log if d.reward is not None}
        for (_, arm), reward in seen.items():
            rewards[arm].append(reward)
    rows: list[list[b.Cell]] = [
        [
            arms[i].name,
            arms[i].num_rows,
            int(draws[i]),
            float(draws[i] / max(1, draws.sum())),
            mean_std(rewards[i]) if rewards[i] else None,
        ]
        for i in np.argsort(-draws, kind="stable")
    ]
    columns = {"Arm": "text", "rows": "compact wide", "draws": "compact", "share": "percent"}
    return [b.Table(columns | {"reward": "decimals3"}, rows)]


def _warnings(totals: Runs, made: MixRun) -> list[b.Warn]:
    main = made.rules[0].label
    found = [
        b.Warn(f"{label}, seed {run['seed']}: {complaint}", "The reward was not learned from.")
        for label, runs in totals.items()
        for run in runs
        for complaint in run["complaints"][:3]
    ]
    found += guessing(main, [run["test"] for run in totals[main]])
    found += one_sided(totals) + unaffordable(made.rules)
    if cut := sum(counts.get("truncated", 0) for counts in made.arms.counts.values()):
        rows = "1 row of the arms was" if cut == 1 else f"{cut:,} rows of the arms were"
        found.append(b.Warn(f"{rows} longer than the model's lengths and cut"))
    if skipped := made.arms.skipped:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(skipped.items()))
        found.append(b.Warn(f"{len(skipped)} arms were left out: {sorted(skipped)}", reasons))
    return found


def guessing(main: str, tests: Sequence[Mapping[str, Any]]) -> list[b.Warn]:
    """An accuracy within the mean of the seeds' intervals of that of a guess."""
    chance = tests[0]["chance"]
    if chance is None or fmean(test["interval"][0] for test in tests) > chance:
        return []
    accuracy = fmean(test["accuracy"] for test in tests)
    title = f"The accuracy of {main}, {accuracy:.3f}, cannot be told from that of a guess among "
    title += f"the choices, {chance:.3f}"
    return [b.Warn(title, "Compare losses, or give the model more to learn from.")]


def one_sided(totals: Runs) -> list[b.Warn]:
    """DoReMi's averaged weights nearly all on one arm, an effect of small batches."""
    found: list[b.Warn] = []
    for label, runs in totals.items():
        for run in runs:
            weights: dict[str, float] = run.get("average_weights", {})
            top = max(weights, key=lambda name: weights[name], default="")
            if weights and weights[top] > _NEARLY_ALL:
                title = f"{label}, seed {run['seed']}, gives {weights[top]:.1%} of its weight to "
                advice = "Lower `policy.eta` (0.1), raise `train.accumulation`, or set "
                advice += "`policy.size_temperature: 1`."
                found.append(b.Warn(f"{title}arm {top}", advice))
    return found


def unaffordable(rules: Sequence[Rule]) -> list[b.Warn]:
    """Baselines whose initial pass over the arms left them a single step."""
    advice = "Its first pass over the arms costs as many gradient passes as all steps of the "
    advice += "policy: raise `train.num_steps`."
    return [
        b.Warn(f"The baseline {rule.label} had one step", advice)
        for rule in rules[1:]
        if rule.num_steps == 1 < rules[0].num_steps
    ]
