"""`job: generate`: seeds -> the loop of a method, whose programs run on workers -> pairs."""

import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stillhouse.errors import InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.generation.asking import Item, Role
from stillhouse.generation.method import Generated, Generation
from stillhouse.generation.model_settings import EndpointSettings, LocalModelSettings
from stillhouse.generation.screening import HeldOut, Screen
from stillhouse.generation.seeds import SeedsTask
from stillhouse.generation.spec import GenerateSpec
from stillhouse.generation.task import DraftTask, GeneratorHost
from stillhouse.pipelines.context import Context, Step, Unfinished, perform
from stillhouse.pipelines.generate_inputs import GenerateInputs, generator_models
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store
from stillhouse.storage.filesystem import join
from stillhouse.storage.layout import LAYOUT_VERSION
from stillhouse.storage.parquet import read_table

GENERATED = "generated"
SPENT = "spent.json"
_IN_BATCHES, _IN_FLIGHT = 32, 64
"""Items of a task, at least half as many where there are some: with models here, or endpoints."""
_PART_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class GenerateRun:
    """The results of a generation.

    Attributes:
        counts: of calls, made by any job or found (`Asker.counts`).
        dropped: items left out, by reason.
        identical: whether strong model and student are one.
        spent: in all runs of the job, by role: `calls`, `prompt_tokens`, `completion_tokens`.
    """

    manifest: Manifest
    made: Generated
    num_seeds: int
    counts: Counter[str]
    dropped: Counter[str]
    warnings: list[str]
    identical: bool
    spent: dict[str, dict[str, int]]


def run_generate(
    ctx: Context, spec: GenerateSpec, inputs: GenerateInputs, run_uri: str
) -> GenerateRun:
    """Generate, or find what was generated.

    Raises:
        SpentError, EndpointError: run again to go on; nothing is asked for twice.
        InputError: nothing was kept.
    """
    read = SeedsTask(inputs.seeds, inputs.heldout, spec.languages == "seeds")
    [receipt] = perform(ctx, Step("seeds", [read], unit="seeds"))
    models = generator_models(ctx, spec)
    with _counting(ctx, spec, run_uri) as spending:
        shop = Shop(ctx, spec, inputs, models, spending, receipt)
        made = spec.generation.make(shop, shop.seeds)
        if not made.items:
            reasons = ", ".join(shop.reason(why) for why, _ in shop.dropped.most_common(5))
            raise InputError(f"nothing was kept of what was generated: {reasons}")
        manifest = _put(ctx, spec, inputs, models, made)
        spent = spending.save()
    return GenerateRun(
        manifest,
        made,
        len(shop.seeds),
        shop.counts,
        shop.dropped,
        shop.warnings,
        "student" in models and models["strong"].identity == models["student"].identity,
        spent,
    )


class _NoCount:
    """For a dry run, which makes no calls."""

    def take(self, role: Role, calls: int) -> None: ...
    def used(self, role: Role, prompt_tokens: int, completion_tokens: int) -> None: ...
    def save(self) -> dict[str, dict[str, int]]:
        return {}


@contextmanager
def _counting(ctx: Context, spec: GenerateSpec, run_uri: str) -> Generator[Any]:
    """The count of calls; what is spent stays in the run's folder."""
    if ctx.dry:
        yield _NoCount()
        return
    from stillhouse.actors.call_budget import CallBudget

    budget = CallBudget.start(join(run_uri, SPENT), spec.budget.calls, spec.budget.tokens)
    try:
        yield budget
    finally:
        with suppress(Exception):  # the cluster may be what failed
            budget.close()


class Shop:
    """The engine's side of a method's loop (`Workshop`)."""

    def __init__(
        self,
        ctx: Context,
        spec: GenerateSpec,
        inputs: GenerateInputs,
        models: Mapping[Role, LocalModelSettings | EndpointSettings],
        spending: Any,
        read: Receipt,
    ) -> None:
        compute = ctx.compute
        widths = {
            role: one.in_flight for role, one in models.items() if isinstance(one, EndpointSettings)
        }
        self._workers = min([compute.generators, *widths.values()])
        shares = {role: width // self._workers for role, width in widths.items()}
        self._most = _IN_FLIGHT if widths else _IN_BATCHES
        self._ctx, self._spec, self._inputs = ctx, spec, inputs
        self._names = {role: one.identity for role, one in models.items()}
        self._host = GeneratorHost(models, shares, spending)
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._details: dict[str, str] = {}
        self.seeds = _items(ctx.store, read.parts[0])
        self._screen = self._made_screen(read)

    def _made_screen(self, read: Receipt) -> Screen:
        from stillhouse.selection.contamination import NgramIndex

        _, grams, texts = (read_table(self._ctx.store.path(part.path)) for part in read.parts)
        heldout = HeldOut(
            NgramIndex(grams["hash"].to_numpy()), frozenset(texts["text"].to_pylist())
        )
        languages: frozenset[str] | None = None
        if self._spec.languages == "seeds":
            languages = frozenset(read.info["languages"]) or None
        elif self._spec.languages != "any":
            languages = frozenset(self._spec.languages)
        prompts = [seed["instruction"] for seed in self.seeds]
        return Screen(prompts, heldout, languages, self._spec.near)

    def run(self, step: str, program: str, items: Sequence[Item]) -> list[Item]:
        """See `Workshop`."""
        size = min(self._most, max(self._most // 2, -(-len(items) // 8)))
        inputs = self._inputs
        tasks = [
            DraftTask(
                inputs.method,
                inputs.judge,
                program,
                tuple(items[start : start + size]),
                self._names,
            )
            for start in range(0, len(items), size)
        ]
        if not tasks:
            return []
        generator = self._ctx.compute.generator
        work = Step(step, tasks, self._host, self._workers, generator, "items")
        made: list[Item] = []
        for receipt in perform(self._ctx, work):
            counts = Counter(receipt.counts)
            del counts["items"]
            self.counts += counts
            made += _items(self._ctx.store, receipt.parts[0])
        return made

    def screened(self, items: Sequence[Item], *keys: str) -> list[Item]:
        """See `Workshop`."""
        kept = [*items]
        for key in keys:
            reasons = [*self._screen.reasons(key, [item[key] for item in kept])]
            for item, reason in zip(kept, reasons, strict=True):
                if reason is not None:
                    self.drop(reason, [item])
            pairs = zip(kept, reasons, strict=True)
            kept = [item for item, reason in pairs if reason is None]
        return kept

    def delivered(self, items: Sequence[Item], key: str) -> None:
        """See `Workshop`."""
        self._screen.add(item[key] for item in items)

    def drop(self, reason: str, items: Sequence[Item]) -> None:
        """See `Workshop`; of `reason: details` the first details are kept as an example."""
        reason, _, details = reason.partition(": ")
        if items:
            self.dropped[reason] += len(items)
            self._details.setdefault(reason, details)

    def reason(self, name: str) -> str:
        """How many items were dropped for a reason, with an example."""
        details = self._details[name]
        return f"{self.dropped[name]:,} {name}{f' ({details})' if details else ''}"

    def warn(self, text: str) -> None:
        """See `Workshop`."""
        self.warnings.append(text)


def _items(store: Store, part: PartRef) -> list[Item]:
    return [json.loads(one) for one in read_table(store.path(part.path))["item"].to_pylist()]


def _put(
    ctx: Context,
    spec: GenerateSpec,
    inputs: GenerateInputs,
    models: Mapping[Role, LocalModelSettings | EndpointSettings],
    made: Generated,
) -> Manifest:
    """Write what was generated as an artifact, named by its content."""
    method = spec.generation
    record = {
        "prompts": method.prompts,
        "judge": [spec.judge.name, spec.judge.prompts],
        "temperature": method.temperature,
        "max_tokens": method.max_tokens,
        "seed": method.seed,
        "models": {role: one.identity for role, one in models.items()},
    }
    name = fingerprint([GENERATED, LAYOUT_VERSION, method.name, record, made.items])
    found = ctx.store.find_manifest(GENERATED, name)
    if found is not None:
        return found
    if ctx.dry:
        raise Unfinished("result")
    parts = [
        ctx.store.put_part(
            f"{GENERATED}/{name}/part-{number:05d}.parquet",
            _table(method, record, made.items[start : start + _PART_ROWS], start),
            num_tokens=0,
        )
        for number, start in enumerate(range(0, len(made.items), _PART_ROWS))
    ]
    settings = {"generation": method.model_dump(mode="json"), "judge": spec.judge.model_dump()}
    totals = {"rounds": made.rounds, **made.numbers}
    manifest = Manifest(
        GENERATED, name, tuple(parts), {"seeds": inputs.identity()}, settings | record, totals
    )
    return ctx.store.put_manifest(manifest)


def _table(
    method: Generation, record: dict[str, Any], items: Sequence[Item], first: int
) -> pa.Table:
    """Rows with the method's columns, as conversations where they are pairs, and their records."""
    columns: dict[str, Any] = {"id": [f"{first + n:08d}" for n in range(len(items))]}
    for name in method.columns:
        values = [one[name] for one in items]
        texts = [", ".join(value) if isinstance(value, list) else value for value in values]
        columns[name] = values if name in method.numeric else texts
    if {"instruction", "response"} <= {*method.columns}:
        columns["messages"] = [
            [
                {"role": "user", "content": one["instruction"]},
                {"role": "assistant", "content": one["response"]},
            ]
            for one in items
        ]
    columns["record"] = [
        json.dumps(record | {k: v for k, v in one.items() if k not in method.columns})
        for one in items
    ]
    return pa.table(columns)
