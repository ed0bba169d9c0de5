"""Does the bandit find the two arms of twenty that are the target's own distribution?

    python benchmarks/mixing_planted.py --data ../shared/data --work FOLDER --json OUT

Target: 64 examples of SNLI (32 train, 32 validate). Arms: two more samples of SNLI's rows (good);
two with wrong labels, two of shuffled words, three in other languages, eleven of fluent English or
code of other domains. Small T5, 300 steps of 8 micro-batches and the target's pass. Runs are kept
in FOLDER: with `--seconds` a call works for so long, and the next one goes on.

The rewards that a run measured are given to the pure policy again, in two ways: with the run's own
random numbers (then every draw has to be the run's), and REPEATS times with others, an arm's reward
then being one of its five measured nearest in time (then the last quarter's share has to be the
run's within 0.05, on average over the seeds).
"""

import random
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from mixing_runs import World, make_world, options, run_one, task_of, write_json
from released_samplers import ReleasedExp3, ReleasedUcb1

from stillhouse.mixing.decisions import Decision, log_parts, read_decisions
from stillhouse.mixing.flad import Exp3, Ucb1
from stillhouse.mixing.policy import MixFacts, Policy, State, StepPlan
from stillhouse.mixing.spec import MixModel, MixTraining, Rule
from stillhouse.mixing.static import Static

GOOD = ("good_a", "good_b")
WRONG = ("wrong_a", "wrong_b")
DOMAINS = (
    *("books", "arxiv_abstracts", "us_law", "movie_reviews", "commit_messages"),
    *("math_word_problems", "medical_qa", "factbook", "speeches", "textbooks", "task_dialogue"),
)
LENGTHS = (48, 48)
STEPS, SLOTS, SHOTS, BATCH = 300, 8, 64, 8
MODEL = MixModel(hidden_size=64, num_layers=1)
TRAIN = MixTraining(
    learning_rate=5e-4, micro_batch=BATCH, warmup=0.05, optimizer="adamw", patience=None
)
REPLAY_WITHIN = 0.05
REPEATS = 20
FLOORS = {"ucb1 faithful": 0.30, "exp3 faithful": 0.20}
_REWARDS: dict[str, Any] = {"initial_examples": 64, "reward": "alignment"}
POLICIES: dict[str, Policy] = {
    "ucb1 faithful": Ucb1(name="ucb1", **_REWARDS),
    "ucb1 released": ReleasedUcb1(name="ucb1", target_batches=4, **_REWARDS),
    "exp3 faithful": Exp3(name="exp3", **_REWARDS),
    "exp3 released": ReleasedExp3(name="exp3", **_REWARDS),
}
SWEEP = (0.1, 0.3, 0.6, 1.0)
"""Shares of the two good arms together in the static mixtures."""
SWEEP_SEEDS = 2


def planted(data: Path) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The arms' rows by name, and the target's."""
    rng = random.Random(0)
    table = pq.read_table(data / "tasks/targets.parquet").to_pylist()
    keys = ("input", "target", "choices")
    snli = [
        {k: row[k] for k in keys} | {"split": row["split"]}
        for row in table
        if row["task"] == "snli"
    ]
    train = [row for row in snli if row["split"] == "train"]
    rng.shuffle(train)
    target = train[:200] + [row for row in snli if row["split"] == "test"][:120]
    cut = {"good_a": train[200:400], "good_b": train[400:600]}
    wrong = {"wrong_a": train[600:800], "wrong_b": train[800:1000]}
    arms: dict[str, list[dict[str, Any]]] = {
        name: [{"input": r["input"], "target": r["target"]} for r in rows]
        for name, rows in cut.items()
    }
    for name, rows in wrong.items():
        arms[name] = [
            {
                "input": r["input"],
                "target": rng.choice([c for c in r["choices"] if c != r["target"]]),
            }
            for r in rows
        ]
    texts = _texts(data)
    for name, source in (("shuffled_a", "books"), ("shuffled_b", "movie_reviews")):
        arms[name] = [{"text": _shuffled(text, rng)} for text in texts[source][300:500]]
    for name in ("cli_cheatsheets_i18n", "udhr_multilingual", "ml_readmes_zh"):
        arms[name] = [{"text": text} for text in texts[name][:300]]
    for name in DOMAINS:
        arms[name] = [{"text": text} for text in texts[name][:300]]
    assert len(arms) == 20
    return arms, target


def _texts(data: Path) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for file in sorted((data / "pool").glob("*.parquet")):
        table = pq.read_table(file, columns=["text", "source"])
        for text, source in zip(
            table["text"].to_pylist(), table["source"].to_pylist(), strict=True
        ):
            texts.setdefault(source, []).append(text[:1000])
    return texts


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def run(world: World, label: str, policy: Policy, seed: int) -> dict[str, Any]:
    """One run: shares of the good arms by step, the rewards that it measured, its losses."""
    plan = StepPlan(SHOTS // 2 // BATCH, "alignment")
    if isinstance(policy, Static):
        plan = StepPlan(SHOTS // 2 // BATCH)
    rule = Rule(label, policy, plan, SLOTS, STEPS)
    task = task_of(world, rule, seed=seed, train=TRAIN, model=MODEL, num_shots=SHOTS)
    made = run_one(world, task)
    decisions, arms = read_decisions(log_parts(made.totals["log"]))
    good = [arms.index(name) for name in GOOD]
    by_step = np.array([d.arm in good for d in decisions]).reshape(-1, SLOTS).mean(1)
    quarters = [float(part.mean()) for part in np.array_split(by_step, 4)]
    last = [arms[d.arm] for d in decisions if d.step >= STEPS * 3 // 4]
    heldout = [row["heldout_nll"] for row in made.totals["curve"]]
    return {
        "shares": quarters,
        "heldout_nll": min(heldout),
        "heldout_last": heldout[-1],
        "seconds": made.totals["seconds"],
        "last_quarter_by_arm": {n: last.count(n) / len(last) for n in (*GOOD, *WRONG)},
        "rewards": _rewards(decisions, arms),
        "rewards_by_slots": _by_slots(decisions, arms),
    } | (
        {}
        if isinstance(policy, Static)
        else {
            "replayed_draws_equal": _same_draws(policy, decisions, len(arms)),
            "replayed": _replayed(policy, decisions, len(arms), good, seed),
        }
    )


def _rewards(decisions: list[Decision], arms: list[str]) -> dict[str, list[float]]:
    """Mean and spread of good and of bad arms' rewards, by quarter of the run."""
    seen: dict[tuple[int, int], tuple[bool, float]] = {}
    for d in decisions:
        if d.reward is not None:
            seen[d.step, d.arm] = (arms[d.arm] in GOOD, d.reward)
    found: dict[str, list[float]] = {"good": [], "bad": [], "spread": []}
    for quarter in range(4):
        part = [v for (step, _), v in seen.items() if step * 4 // STEPS == quarter]
        for name, wanted in (("good", True), ("bad", False)):
            of = [reward for is_good, reward in part if is_good == wanted]
            found[name].append(fmean(of) if of else float("nan"))
        found["spread"].append(stdev([reward for _, reward in part]) if len(part) > 1 else 0.0)
    return found


def _by_slots(decisions: list[Decision], arms: list[str]) -> dict[str, float]:
    """Mean reward of the arms of the target's form (right and wrong labels) in the middle third,
    by how many of the step's micro-batches the arm had.
    """
    form = {arms.index(name) for name in (*GOOD, *WRONG)}
    count: dict[tuple[int, int], int] = {}
    reward: dict[tuple[int, int], float] = {}
    for d in decisions:
        if d.arm in form and STEPS // 3 <= d.step < STEPS * 2 // 3 and d.reward is not None:
            count[d.step, d.arm] = count.get((d.step, d.arm), 0) + 1
            reward[d.step, d.arm] = d.reward
    found: dict[str, list[float]] = {"1": [], "2-3": [], "4-7": [], "8": []}
    for place, slots in count.items():
        key = "1" if slots == 1 else "2-3" if slots < 4 else "4-7" if slots < 8 else "8"
        found[key].append(reward[place])
    return {key: fmean(values) for key, values in found.items() if values}


def _replayed(
    policy: Policy, decisions: list[Decision], num_arms: int, good: list[int], seed: int
) -> float:
    """Last-quarter share of the pure policy under rewards that are drawn from the run's own."""
    history: dict[int, list[tuple[int, float]]] = {arm: [] for arm in range(num_arms)}
    for d in decisions:
        if d.reward is not None and (not history[d.arm] or history[d.arm][-1][0] != d.step):
            history[d.arm].append((d.step, d.reward))
    near = {arm: [_nearest(of, step) for step in range(STEPS)] for arm, of in history.items()}
    last: list[bool] = []
    for repeat in range(REPEATS):
        state = _started(policy, decisions, num_arms)
        rng = np.random.default_rng([seed, 99, repeat])
        for step in range(STEPS):
            arms = [policy.play(state, float(rng.random())) for _ in range(SLOTS)]
            found = {arm: float(rng.choice(near[arm][step])) for arm in sorted(set(arms))}
            policy.update(state, found)
            if step >= STEPS * 3 // 4:
                last += [arm in good for arm in arms]
    return fmean(last)


def _same_draws(policy: Policy, decisions: list[Decision], num_arms: int) -> bool:
    """Whether the pure policy draws as the run did, from its rewards and random numbers."""
    state = _started(policy, decisions, num_arms)
    for start in range(0, len(decisions), SLOTS):
        step = decisions[start : start + SLOTS]
        if [policy.play(state, d.uniform) for d in step] != [d.arm for d in step]:
            return False
        policy.update(state, {d.arm: d.reward for d in step if d.reward is not None})
    return True


def _started(policy: Policy, decisions: list[Decision], num_arms: int) -> State:
    """The policy's state as the run began; UCB1's first indices exceed its first rewards."""
    first: list[float] = []
    if decisions[0].indices is not None:
        first = (np.array(decisions[0].indices) - np.sqrt(2 * np.log(num_arms))).tolist()
    arms = [str(arm) for arm in range(num_arms)]
    return policy.start(MixFacts(arms=arms, accumulation=SLOTS, initial_rewards=first))


def _nearest(history: list[tuple[int, float]], step: int) -> list[float]:
    """The five rewards of an arm nearest to a step; 0 for one that never had any."""
    near = sorted(history, key=lambda item: abs(item[0] - step))[:5]
    return [reward for _, reward in near] or [0.0]


def report(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over seeds."""
    table: dict[str, Any] = {}
    for label, by_seed in results.items():
        runs = list(by_seed.values())
        last = [r["shares"][3] for r in runs]
        row = {
            "seeds": len(runs),
            "share_by_quarter": [fmean(r["shares"][q] for r in runs) for q in range(4)],
            "last_quarter": fmean(last),
            "last_quarter_sd": stdev(last) if len(last) > 1 else None,
            "heldout_nll": fmean(r["heldout_nll"] for r in runs),
            "seconds": fmean(r["seconds"] for r in runs),
        }
        row["by_arm"] = {
            arm: [round(r["last_quarter_by_arm"][arm], 3) for r in runs] for arm in (*GOOD, *WRONG)
        }
        if "replayed" in runs[0]:
            row["replayed"] = fmean(r["replayed"] for r in runs)
            row["replayed_within"] = abs(row["replayed"] - row["last_quarter"]) <= REPLAY_WITHIN
            row["replayed_draws_equal"] = all(r["replayed_draws_equal"] for r in runs)
            row["rewards_by_slots"] = {
                key: fmean(r["rewards_by_slots"][key] for r in runs if key in r["rewards_by_slots"])
                for key in ("1", "2-3", "4-7", "8")
                if any(key in r["rewards_by_slots"] for r in runs)
            }
            row["rewards"] = {
                key: [fmean(r["rewards"][key][q] for r in runs) for q in range(4)]
                for key in ("good", "bad", "spread")
            }
        table[label] = row
    return table


def main() -> int:
    """Run what is missing, write the figures; 1 where a floor or a replay is missed."""
    given = options(__doc__, seeds=5).parse_args()
    torch.set_num_threads(1)
    started = perf_counter()
    arms, target = planted(given.data)
    world = make_world(given.work, arms, target, vocab_size=2048, lengths=LENGTHS)
    names = [part.name for part in world.arms]
    runs: list[tuple[str, Policy, int]] = []
    for label, policy in sorted(POLICIES.items(), key=lambda of: of[0].split()[1]):
        runs += [(label, policy, seed) for seed in range(given.seeds)]
    for seed in range(min(given.seeds, SWEEP_SEEDS)):
        for share in SWEEP:
            weights = {n: share / 2 if n in GOOD else (1 - share) / 18 for n in names}
            runs.append((f"static {share:g}", Static(name="static", weights=weights), seed))
    results: dict[str, dict[str, Any]] = {}
    for label, policy, seed in runs:
        if perf_counter() - started > given.seconds:
            print("not finished: call it again")
            return 3
        results.setdefault(label, {})[str(seed)] = run(world, label, policy, seed)
        print(label, seed, results[label][str(seed)], flush=True)
        write_json(given.json, {"table": report(results), "runs": results})
    table = report(results)
    missed = [f for f, floor in FLOORS.items() if table[f]["last_quarter"] < floor]
    for label in POLICIES:
        row = table[label]
        missed += [f"{label}, replayed"] * (not row["replayed_within"])
        missed += [f"{label}, draws of the replay"] * (not row["replayed_draws_equal"])
    print("missed:", missed)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
