"""Does generated data help where CodecLM says it does, and how fast is it made? Small real models.

    python benchmarks/generate.py --store STORE --json OUT.jsonl [--stage ablation wrong speed]

The models are trained once in STORE, on the conversations of `examples/build_dialogues.py`, whose
right answers are known. One line of JSON for each cell; running again does what is missing.

* ablation: a student is trained on equally many pairs and tokens: requests of any kind (`random`),
  of the target's use cases and skills (`metadata`), rewritten by an action (`rubrics`), or kept by
  the gap (`filter`). Held-out loss and share of right answers on other requests of the target.
* wrong: the strong model was taught wrong answers half of the time. The share of right ones among
  all of its answers, and among those that are kept.
* speed: instructions a minute of CodecLM with models in two workers, answers of at most 32 tokens;
  the strong one has 0.7 M parameters.
* calls: calls a second of an endpoint that answers after 0.2 s and fails one in ten, 64 at a time,
  over what 64 calls at a time could reach.

`--small` finds mistakes, not figures.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE), str(HERE.parent / "tests")]

import build_dialogues as world  # noqa: E402
from teacher_models import ray_session  # noqa: E402

import stillhouse  # noqa: E402
from stillhouse.generation.asking import Ask, Asker  # noqa: E402
from stillhouse.generation.endpoint import Endpoint  # noqa: E402
from stillhouse.generation.local_model import LocalModel  # noqa: E402
from stillhouse.generation.model_settings import (  # noqa: E402
    EndpointSettings,
    LocalModelSettings,
)
from stillhouse.generation.spec import GenerateSpec  # noqa: E402
from stillhouse.jobs.progress import Lines  # noqa: E402
from stillhouse.jobs.run import run_job  # noqa: E402
from stillhouse.spec import ScoringSettings  # noqa: E402
from stillhouse.storage.artifact import Store  # noqa: E402
from stillhouse.text.tokenizer import load_tokenizer  # noqa: E402
from stillhouse.training.spec import TrainSpec  # noqa: E402

ARMS = ("random", "metadata", "rubrics", "filter")
TARGET = {"uses": ["joining words", "repeating words"], "lengths": ["long lists"]}
SIZES = {
    "strong": {"hidden_size": 128, "num_layers": 3},
    "student": {"hidden_size": 64, "num_layers": 2},
}
Cell = dict[str, Any]


class Bench:
    """The models and files of one store."""

    def __init__(self, store: Path, small: bool) -> None:
        self.store, self.small = store, small
        self.folder = store / "inputs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def rows(self, name: str, rows: Sequence[Any]) -> str:
        """A JSON Lines file."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def train(self, data: str, model: str, tokens: int, **changes: Any) -> dict[str, Any]:
        """A training in this store; its result."""
        tokens //= (2 if model == "strong" else 20) if self.small else 1
        train = {"num_tokens": tokens, "global_batch": 8, "learning_rate": 4e-3, "eval_points": 1}
        content: dict[str, Any] = {
            "job": "train",
            "store": str(self.store),
            "data": {"path": data},
            "sequence_length": 256,
            "train": train | changes.pop("train", {}),
            "compute": {"trainers": 2 if model == "strong" else 1},
            **changes,
        }
        if "init" not in content:
            content["model"] = SIZES[model] | {"max_position": 384}
        return run_job(TrainSpec.model_validate(content), Lines())

    def models(self, wrong: bool = False) -> dict[str, str]:
        """Folders of strong model and student; `wrong`: of one taught wrong answers as well."""
        rng = random.Random(0)
        answers = world.answers(rng, 36_000, [*world.LENGTHS])
        strong = world.orders(rng, 1500) + answers
        rng.shuffle(strong)
        taught = {"tokenizer": {"train": {"vocab_size": 640}}}
        good = self.train(self.rows("strong", strong), "strong", 2_000_000, **taught)
        own = {"tokenizer": {"path": good["artifacts"]["tokenizer"]}}
        found = {"strong": good["artifacts"]["model"]}
        if wrong:
            spoiled = world.orders(rng, 1500) + with_wrong(rng, answers)
            rng.shuffle(spoiled)
            made = self.train(self.rows("spoiled", spoiled), "strong", 2_000_000, **own)
            found["spoiled"] = made["artifacts"]["model"]
        short = world.answers(rng, 6000, ["short lists"])
        made = self.train(self.rows("student", short), "student", 250_000, **own)
        return found | {"student": made["artifacts"]["model"]}

    def generate(self, seeds: str, models: dict[str, str], **changes: Any) -> dict[str, Any]:
        """A generation in this store; its result."""
        generation = {"max_tokens": 32, "num_metadata": 40} | changes.pop("generation")
        content: dict[str, Any] = {
            "job": "generate",
            "store": str(self.store),
            "seeds": {"path": seeds},
            "strong": {"path": models["strong"]},
            "student": {"path": models["student"]},
            "judge": {"name": "likelihood"},
            "near": 1.0,
            "languages": "any",
            "generation": generation,
            "compute": {"generators": 2},
            **changes,
        }
        return run_job(GenerateSpec.model_validate(content), Lines())


def with_wrong(rng: random.Random, rows: Sequence[world.Row]) -> list[world.Row]:
    """Conversations, half of which have the answer of another one."""
    answers = [row["messages"][1]["content"] for row in rows]
    return [
        world.turn(
            row["messages"][0]["content"],
            rng.choice(answers) if rng.random() < 0.5 else row["messages"][1]["content"],
        )
        for row in rows
    ]


def pairs_of(rng: random.Random, count: int, target: bool) -> list[world.Row]:
    """Requests and right answers of the target's distribution, or of any kind."""
    uses = TARGET["uses"] if target else [*world.USES]
    lengths = TARGET["lengths"] if target else [*world.LENGTHS]
    rows: list[world.Row] = []
    for _ in range(count):
        use, theme = rng.choice(uses), rng.choice([*world.THEMES])
        words = world.draw(rng, use, theme, rng.choice(lengths))
        rows.append(world.turn(world.request(use, words), world.USES[use][1](words)))
    return rows


def share_right(rows: Sequence[tuple[str, str]]) -> float:
    """Of requests that have a right answer, the share of pairs with it."""
    known = [(world.solve(request), answer) for request, answer in rows]
    return fmean(right == answer for right, answer in known if right is not None)


def answers_of(folder: str, prompts: Sequence[str]) -> list[str]:
    """A model's answers, its likeliest tokens."""
    tokenizer = load_tokenizer(folder, None)
    settings = LocalModelSettings(
        folder, tokenizer.digest, tokenizer.eos_token, None, (), 384, ScoringSettings(), folder,
        folder, "cpu", 0, 1,
    )  # fmt: skip
    asks = [Ask("student", prompt, max_tokens=24) for prompt in prompts]
    return [answer.text for answer in LocalModel(settings).answer(asks)]


def ablation_cell(bench: Bench, seed: int, arm: str) -> Cell:
    """A student after training on one arm's pairs."""
    models, rng = bench.models(), random.Random(seed)
    count = 20 if bench.small else 300
    seeds = pairs_of(rng, 40, target=arm != "random")
    test = pairs_of(random.Random(1000 + seed), 300, target=True)
    held = {row["messages"][0]["content"] for row in seeds}
    test = [row for row in test if row["messages"][0]["content"] not in held]
    generation: dict[str, Any] = {"num_pairs": count, "seed": seed, "waves": 4}
    if arm == "filter":
        generation |= {"keep": 0.5, "iterations": 3}
    else:
        rounds = 2 if arm == "rubrics" else 1
        generation |= {"name": "generate_arms:Unfiltered", "theta": 0, "iterations": rounds}
    made = bench.generate(bench.rows(f"seeds-{arm}-{seed}", seeds), models, generation=generation)
    rows = stillhouse.open_artifact(made["artifacts"]["generated"])
    pairs = [(one["instruction"], one["response"]) for one in rows.to_datasets()]
    trained = bench.train(
        rows.uri,
        "student",
        30_000,
        sequence_length=64,
        init={"path": models["student"]},
        heldout={"path": bench.rows(f"test-{seed}", test)},
        train={"learning_rate": 1e-3, "seed": seed},
    )
    prompts = [row["messages"][0]["content"] for row in test]
    said = answers_of(trained["artifacts"]["model"], prompts)
    return {
        "nll": trained["train"]["heldout_nll"],
        "right": share_right([*zip(prompts, said, strict=True)]),
        "pairs": len(pairs),
        "pairs_right": share_right(pairs),
    }


def wrong_cell(bench: Bench, seed: int) -> Cell:
    """Right answers among all and among kept pairs of a strong model that is often wrong."""
    models = bench.models(wrong=True)
    rng, count = random.Random(seed), 20 if bench.small else 150
    seeds = bench.rows(f"seeds-wrong-{seed}", pairs_of(rng, 40, target=False))
    spoiled = {"strong": models["spoiled"], "student": models["student"]}
    common = {"num_pairs": count, "seed": seed, "waves": 1}
    judge = {"judge": {"name": "likelihood", "model": {"path": models["strong"]}}}
    found: Cell = {}
    for name, changes in (
        ("all", {"name": "generate_arms:Unfiltered", "theta": 0, "iterations": 1}),
        ("kept", {"keep": 0.3, "iterations": 1}),
    ):
        made = bench.generate(seeds, spoiled, generation=common | changes, **judge)
        rows = stillhouse.open_artifact(made["artifacts"]["generated"]).to_datasets()
        pairs = [(one["instruction"], one["response"]) for one in rows]
        found |= {name: share_right(pairs), f"{name}_pairs": len(pairs)}
    return found


def speed_cell(bench: Bench, seed: int) -> Cell:
    """Judged instructions a minute, in a store of its own."""
    models, count = bench.models(), 20 if bench.small else 200
    seeds = bench.rows("seeds-speed", pairs_of(random.Random(seed), 40, target=False))
    with TemporaryDirectory() as folder:
        other = Bench(Path(folder), bench.small)
        generation = {"num_pairs": count, "keep": 0.5, "iterations": 3, "waves": 1, "seed": seed}
        other.generate(seeds, models, generation=generation | {"num_pairs": 2})  # models are there
        began = time.perf_counter()
        made = other.generate(seeds, models, generation=generation)
        seconds = time.perf_counter() - began
    judged = count * 60 / seconds
    return {"instructions_a_minute": judged, "calls": made["generate"]["calls"], "seconds": seconds}


def calls_cell(bench: Bench) -> Cell:
    """Calls a second through 64 threads, where each takes 0.2 s and one in ten fails."""
    from generation.servers import template_server
    from generation.stand_in import Unlimited

    count, delay = 200 if bench.small else 2000, 0.2

    def program(number: int) -> Any:
        [answer] = yield [Ask("strong", f"request {number}", seed=number)]
        return {"text": answer.text}

    with template_server() as server, TemporaryDirectory() as folder:
        server.fail_one_in, server.delay_s = 10, delay
        settings = EndpointSettings(url=server.url, model="m")
        asker = Asker(Store(folder), {"strong": Endpoint(settings, 64)}, Unlimited())
        began = time.perf_counter()
        made = asker.run(program(number) for number in range(count))
        seconds = time.perf_counter() - began
        assert len(made) == server.asked == count
        return {
            "calls_a_second": count / seconds,
            "share_of_bound": count / seconds / (0.9 * 64 / delay),
            "most_at_once": server.most,
        }


def cells(
    stages: Sequence[str], small: bool
) -> Iterator[tuple[str, Cell, Callable[[Bench], Cell]]]:
    """Every cell: its stage, its settings, and what measures it."""
    seeds = range(1 if small else 3)
    for stage in stages:
        if stage == "ablation":
            for seed in seeds:
                for arm in ARMS:
                    measure = partial(ablation_cell, seed=seed, arm=arm)
                    yield stage, {"arm": arm, "seed": seed}, measure
        elif stage == "calls":
            yield stage, {}, calls_cell
        else:
            of = {"wrong": wrong_cell, "speed": speed_cell}[stage]
            for seed in seeds:
                yield stage, {"seed": seed}, partial(of, seed=seed)


def table(found: Sequence[dict[str, Any]]) -> None:
    """Means and standard errors over the seeds."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for one in found:
        key = one["stage"], one["settings"].get("arm", "")
        groups.setdefault(key, []).append(one["measured"])
    for (stage, arm), rows in groups.items():
        shown = []
        for name in rows[0]:
            values = [row[name] for row in rows]
            error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            shown.append(f"{name} {fmean(values):.3f}{error}")
        print(f"{stage} {arm}: {', '.join(shown)}")


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stage", nargs="+", default=["ablation", "wrong", "speed", "calls"])
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    lines = args.json.read_text().splitlines() if args.json.exists() else []
    found = [json.loads(line) for line in lines]
    bench = Bench(args.store.absolute(), args.small)
    for stage, settings, measure in cells(args.stage, args.small):
        if any((one["stage"], one["settings"]) == (stage, settings) for one in found):
            continue
        with ray_session(bench.store):
            made = {"stage": stage, "settings": settings, "measured": measure(bench)}
        found.append(made)
        with args.json.open("a") as file:
            file.write(json.dumps(made) + "\n")
        print(json.dumps(made), flush=True)
    table(found)


if __name__ == "__main__":
    main()
