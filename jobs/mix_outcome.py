"""What a finished mix job says: the object of `run --json`, and the report."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.jobs.pages import write_report
from stillhouse.mixing.decision_log import log_parts
from stillhouse.mixing.decisions import Decision, read_decisions
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.mix import MixRun, Rule
from stillhouse.pipelines.mix_data import row_fates
from stillhouse.report.data import Curve
from stillhouse.report.mix_data import ArmRow, Heat, MixReport, PolicyRow, SeedRow
from stillhouse.storage.artifact import Manifest
from stillhouse.storage.run_record import RunRecord, now

_BINS = 120
_ENTROPY_BINS = 20
_MOST_DRAWN = 5
_NEARLY_ALL = 0.95
_LIBRARIES = ("stillhouse", "ray", "torch", "transformers")


def write_mix_outcome(
    ctx: Context, spec: MixSpec, made: MixRun, record: RunRecord
) -> dict[str, Any]:
    """Write the report beside the run's record; the result of the job."""
    data = mix_report(spec, made, record.uri)
    report = write_report(record.uri, data)
    main = made.models[made.rules[0].label]
    best = min(main.values(), key=lambda m: m.totals["test"]["nll"])
    return {
        "status": "done",
        "job": "mix",
        "run": record.uri,
        "report": report,
        "artifacts": {
            "tokenizer": made.arms.tokenizer.path,
            "models": {
                label: {
                    str(seed): ctx.store.path("models", m.fingerprint) for seed, m in of.items()
                }
                for label, of in made.models.items()
            },
            "decisions": {
                label: {str(seed): m.totals["log"] for seed, m in of.items()}
                for label, of in made.models.items()
            },
        },
        "model_fingerprint": best.fingerprint,
        "work": {n: {"parts": w.parts, "reused": w.reused} for n, w in ctx.work.items()},
        "mix": {
            label: {"seeds": {str(seed): _measured(m) for seed, m in of.items()}}
            for label, of in made.models.items()
        },
        "rows": row_fates(made.arms),
        "skipped_arms": made.arms.skipped,
        "warnings": data.warnings,
    }


def _measured(made: Manifest) -> dict[str, Any]:
    totals = made.totals
    return {
        "heldout_nll": totals["test"]["nll"],
        "accuracy": totals["test"]["accuracy"],
        "accuracy_interval": totals["test"]["interval"],
        "chance": totals["test"]["chance"],
        "gradient_passes": totals["gradient_passes"],
        "num_steps": totals["num_steps"],
        "draws": totals["draws"],
        "decisions_sha256": totals["decisions_sha256"],
    }


def mix_report(spec: MixSpec, made: MixRun, run_uri: str) -> MixReport:
    """All that the page shows."""
    runs = [(label, m.totals) for label, of in made.models.items() for m in of.values()]
    logs: dict[str, list[list[Decision]]] = {}
    for label, totals in runs:
        if any(totals["draws"].values()):
            logs.setdefault(label, []).append(read_decisions(log_parts(totals["log"]))[0])
    names = [part.name for part in made.arms.arms]
    main = made.rules[0].label
    any_test = runs[0][1]["test"]
    return MixReport(
        title=spec.name or "Mixing for a few-shot target",
        created=now(),
        run_uri=run_uri,
        main=main,
        num_arms=len(names),
        num_shots=spec.target.num_shots,
        test_rows=any_test["num_rows"],
        chance=any_test["chance"],
        policies=[
            PolicyRow(label, [_seed_row(m) for m in of.values()])
            for label, of in made.models.items()
        ],
        heats=[_heat(label, logs[label], names) for label in logs if label in _shown(main, logs)],
        curves=[_curve(label, t, "step") for label, t in runs],
        passes=[_curve(label, t, "passes") for label, t in runs],
        effective=[
            _effective(label, seed, log, len(names))
            for label in logs
            for seed, log in enumerate(logs[label])
        ],
        arms=_arm_rows(logs[main], names, made) if main in logs else [],
        cumulative=_cumulative(logs[main], names) if main in logs else [],
        rows=row_fates(made.arms),
        skipped=made.arms.skipped,
        warnings=_warnings(runs, made),
        spec_yaml=spec.to_yaml(),
        artifacts=[("run", run_uri), ("tokenizer", made.arms.tokenizer.path)],
        environment=[(name, version(name)) for name in _LIBRARIES],
    )


def _shown(main: str, labels: Iterable[str]) -> set[str]:
    """Policies whose draws are worth a plot: uniform ones are not."""
    return {main, *(label for label in labels if label == "static_alignment")}


def _seed_row(made: Manifest) -> SeedRow:
    totals = made.totals
    test = totals["test"]
    interval = test["interval"]
    return SeedRow(
        seed=totals["seed"],
        heldout_nll=test["nll"],
        accuracy=test["accuracy"],
        interval=None if interval is None else (interval[0], interval[1]),
        gradient_passes=totals["gradient_passes"],
        num_steps=totals["num_steps"],
        best_step=totals["best_step"],
        seconds=totals["seconds"],
    )


def _curve(label: str, totals: dict[str, Any], key: str) -> Curve:
    points = [(float(row[key]), row["heldout_nll"]) for row in totals["curve"]]
    return Curve(label, totals["seed"], points)


def _counts(log: Sequence[Decision], num_arms: int, bins: int) -> NDArray[np.float64]:
    """Shares of draws by arm and bin of steps: [K, B]."""
    steps = np.array([d.step for d in log])
    place = steps * bins // (steps.max() + 1)
    counts = np.zeros((num_arms, bins))
    np.add.at(counts, ([d.arm for d in log], place), 1)
    return counts / np.maximum(counts.sum(0), 1)


def _laws(log: Sequence[Decision], num_arms: int, bins: int) -> NDArray[np.float64]:
    """Mean law by bin of steps where one was logged, else the draws' shares: [K, B]."""
    found = _counts(log, num_arms, bins)
    laws = [(d.step, d.probabilities) for d in log if d.probabilities and d.indices is None]
    last = log[-1].step + 1
    for b in range(bins):
        inside = [law for step, law in laws if step * bins // last == b]
        if inside:
            found[:, b] = np.mean(inside, axis=0)
    return found


def _heat(label: str, logs: Sequence[Sequence[Decision]], names: Sequence[str]) -> Heat:
    steps = max(log[-1].step for log in logs) + 1
    bins = min(_BINS, steps)
    shares = np.mean([_laws(log, len(names), bins) for log in logs], axis=0)
    order = np.argsort(-shares.sum(1), kind="stable")
    return Heat(label, [names[int(i)] for i in order], np.round(shares[order], 5).tolist(), steps)


def _effective(label: str, seed: int, log: Sequence[Decision], num_arms: int) -> Curve:
    steps = log[-1].step + 1
    bins = min(_ENTROPY_BINS, steps)
    shares = _laws(log, num_arms, bins)
    logs = np.log(np.where(shares > 0, shares, 1))
    effective = np.exp(-(shares * logs).sum(0))
    points = [((b + 1) * steps / bins, float(effective[b])) for b in range(bins)]
    return Curve(label, seed, points)


def _cumulative(logs: Sequence[Sequence[Decision]], names: Sequence[str]) -> list[Curve]:
    """Draws so far of the most drawn arms, at twenty places of the run."""
    counts = [np.bincount([d.arm for d in log], minlength=len(names)) for log in logs]
    most = np.argsort(-np.sum(counts, axis=0), kind="stable")[:_MOST_DRAWN]
    curves: list[Curve] = []
    for arm in most:
        for seed, log in enumerate(logs):
            steps = log[-1].step + 1
            drawn = np.cumsum(np.bincount([d.step for d in log if d.arm == arm], minlength=steps))
            places = np.unique(np.linspace(1, steps, _ENTROPY_BINS).astype(int))
            points = [(float(place), float(drawn[place - 1])) for place in places]
            curves.append(Curve(names[int(arm)], seed, points))
    return curves


def _arm_rows(
    logs: Sequence[Sequence[Decision]], names: Sequence[str], made: MixRun
) -> list[ArmRow]:
    draws = [0] * len(names)
    rewards: list[list[float]] = [[] for _ in names]
    for log in logs:
        seen: dict[tuple[int, int], float] = {}
        for d in log:
            draws[d.arm] += 1
            if d.reward is not None:
                seen[d.step, d.arm] = d.reward
        for (_, arm), reward in seen.items():
            rewards[arm].append(reward)
    rows = [
        ArmRow(
            name,
            made.arms.arms[i].num_rows,
            draws[i],
            draws[i] / max(1, sum(draws)),
            fmean(rewards[i]) if rewards[i] else None,
            stdev(rewards[i]) if len(rewards[i]) > 1 else None,
        )
        for i, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -row.draws)


def _guessing(main: str, runs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Whether the policy's accuracy is that of a guess, by the mean of its seeds' intervals."""
    tests = [totals["test"] for label, totals in runs if label == main]
    chance = tests[0]["chance"]
    if chance is None or fmean(test["interval"][0] for test in tests) > chance:
        return []
    accuracy = fmean(test["accuracy"] for test in tests)
    return [
        f"the accuracy of {main}, {accuracy:.3f}, cannot be told from that of a guess among the "
        f"choices, {chance:.3f}: compare losses, or give the model more to learn from"
    ]


def _one_sided(runs: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """DoReMi's averaged weights where one arm has nearly all: what small batches do to it."""
    found: list[str] = []
    for label, totals in runs:
        weights: dict[str, float] = totals.get("average_weights", {})
        top = max(weights, key=lambda name: weights[name], default="")
        if weights and weights[top] > _NEARLY_ALL:
            found.append(
                f"{label}, seed {totals['seed']}, gives {weights[top]:.1%} of its weight to arm "
                f"{top}: lower `policy.eta` (0.1), raise `train.accumulation`, or set "
                "`policy.size_temperature: 1`"
            )
    return found


def _unaffordable(rules: Sequence[Rule]) -> list[str]:
    """Controls whose first pass over the arms left them a single step."""
    return [
        f"the control {rule.label} had one step: its first pass over the arms costs as many "
        "gradient passes as all steps of the policy; raise `train.num_steps`"
        for rule in rules[1:]
        if rule.num_steps == 1 < rules[0].num_steps
    ]


def _warnings(runs: Sequence[tuple[str, dict[str, Any]]], made: MixRun) -> list[str]:
    found = [
        f"{label}, seed {totals['seed']}: {complaint}; not learnt from"
        for label, totals in runs
        for complaint in totals["complaints"][:3]
    ]
    found += _guessing(made.rules[0].label, runs) + _one_sided(runs) + _unaffordable(made.rules)
    cut = sum(counts.get("truncated", 0) for counts in made.arms.counts.values())
    if cut:
        found.append(f"{cut:,} rows of arms are longer than the model's lengths and were cut")
    if made.arms.skipped:
        found.append(f"{len(made.arms.skipped)} arms were left out: {sorted(made.arms.skipped)}")
    return found
