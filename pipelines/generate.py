"""`job: generate`: seeds -> the loop of a method, whose programs run on workers -> pairs."""

import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stillhouse.custom_code import CustomCode, find_named
from stillhouse.data_settings import DataSource
from stillhouse.errors import InputError
from stillhouse.fingerprint import fingerprint
from stillhouse.generation.asking import Item, Role
from stillhouse.generation.method import Generated, Generation
from stillhouse.generation.screening import Screen
from stillhouse.generation.seeds import SeedFiles, SeedsTask
from stillhouse.generation.spec import GENERATORS, JUDGES, EndpointSettings, GenerateSpec
from stillhouse.generation.task import DraftTask, GeneratorHost, LocalModelSettings
from stillhouse.models.shape import model_uri
from stillhouse.pipelines.context import Context, Step, perform
from stillhouse.pipelines.given import Needs, check_vocabulary, given_models, model_identity
from stillhouse.pipelines.inputs import list_source
from stillhouse.pipelines.tokenizer import given_tokenizer
from stillhouse.pipelines.train_data import prompt_columns
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, join
from stillhouse.storage.layout import LAYOUT_VERSION
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import load_tokenizer

GENERATED = "generated"
SPENT = "spent.json"
_MAX_ITEMS = 32
"""Of a task; at least half as many where there are some, for whole batches."""
_PART_ROWS = 10_000
_NO_LIMIT = 1 << 30
"""Of a context whose positions are not counted."""


@dataclass(frozen=True, slots=True)
class GenerateInputs:
    """All that a generation reads, by content.

    Attributes:
        seeds, heldout: files.
        models: fingerprints of the given ones, by role.
        code: of a method or judge of the user's.
    """

    seeds: SeedFiles
    heldout: tuple[SeedFiles, ...]
    models: dict[Role, str]
    code: tuple[CustomCode, ...]
    num_bytes: int

    def identity(self) -> list[Any]:
        files = [[one.settings, one.digests] for one in (self.seeds, *self.heldout)]
        return [files, self.models, [one.digest for one in self.code]]


def list_generation(spec: GenerateSpec) -> list[list[FileInfo]]:
    """The files of the seeds, and of each held-out source.

    Raises:
        InputError: nothing there.
    """
    return [list_source(one) for one in (spec.seeds, *spec.decontaminate)]


def open_generation(
    store: Store, spec: GenerateSpec, files: Sequence[list[FileInfo]], *, remember: bool
) -> GenerateInputs:
    """Digests of all that a generation reads.

    Raises:
        ModelError: no such model or tokenizer. SpecError: no such code.
    """
    sources = [
        _files(store, one, found, remember)
        for one, found in zip((spec.seeds, *spec.decontaminate), files, strict=True)
    ]
    paths = given_paths(spec)
    identities = {
        role: model_identity(store, model_uri(path), remember=remember)
        for role, path in paths.items()
    }
    for role, path in paths.items():
        check_vocabulary(load_tokenizer(path, None), path, {role: path})
    size = sum(one.size_bytes for one in files[0])
    return GenerateInputs(sources[0], tuple(sources[1:]), identities, own_code(spec), size)


def _files(store: Store, source: DataSource, found: list[FileInfo], remember: bool) -> SeedFiles:
    source = source.model_copy(update={"columns": prompt_columns(source, found[0].uri)})
    digests = digest_files(store, found, remember=remember)
    return SeedFiles(
        source,
        source.identity(),
        tuple(one.sha256 for one in digests),
        tuple(one.uri for one in found),
    )


def own_code(spec: GenerateSpec) -> tuple[CustomCode, ...]:
    """The code of a method or judge of the user's.

    Raises:
        SpecError: it is not here, or is too large.
    """
    named = [("generation.name", spec.generation.name, GENERATORS)]
    named += [("judge.name", spec.judge.name, JUDGES)]
    found = [find_named(key, name) for key, name, table in named if name not in table]
    return tuple(one for one in found if one is not None)


def given_paths(spec: GenerateSpec) -> dict[Role, str]:
    """The models that are given by path, by role."""
    return {role: one.path for role, one in spec.models.items() if one.path is not None}


@dataclass(frozen=True, slots=True)
class GenerateRun:
    """The results of a generation.

    Attributes:
        counts: of calls and tokens, by role too (`Asker.counts`).
        dropped: items left out, by reason.
        identical: whether strong model and student are one.
        spent: calls and tokens of all runs of the job.
    """

    manifest: Manifest
    made: Generated
    num_seeds: int
    counts: Counter[str]
    dropped: Counter[str]
    warnings: list[str]
    identical: bool
    spent: dict[str, int]


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
    models = _models(ctx, spec)
    with _counting(ctx, spec, run_uri) as spending:
        shop = Shop(ctx, spec, inputs, models, spending, receipt)
        made = spec.generation.make(shop, shop.seeds)
        if not made.items:
            reasons = ", ".join(f"{n:,} {why}" for why, n in shop.dropped.most_common(5))
            raise InputError(f"nothing was kept of what was generated: {reasons or 'no seeds'}")
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


def _models(ctx: Context, spec: GenerateSpec) -> dict[Role, LocalModelSettings | EndpointSettings]:
    """The models by role; those given by path are put into the store."""
    paths = given_paths(spec)
    made = given_models(ctx, {f"{role}": path for role, path in paths.items()}, Needs())
    models: dict[Role, LocalModelSettings | EndpointSettings] = {}
    for role, one in spec.models.items():
        if one.endpoint is not None:
            models[role] = one.endpoint
            continue
        tokenizer = given_tokenizer(ctx, paths[role], None, "auto")
        shape = made[role].shape
        shape.check(f"{role} {paths[role]!r}", tokenizer.vocab_size, 0)
        models[role] = LocalModelSettings(
            made[role].fingerprint,
            tokenizer.digest,
            tokenizer.eos_token,
            tokenizer.bos_id,
            shape.max_positions or _NO_LIMIT,
            spec.scoring,
            made[role].folder,
            tokenizer.path,
            ctx.compute.device,
            ctx.compute.gpus_of(ctx.compute.generator),
            ctx.compute.threads_per_worker,
        )
    return models


class _NoCount:
    """For a dry run, which makes no calls."""

    def take(self, calls: int) -> None: ...
    def used(self, tokens: int) -> None: ...
    def save(self) -> dict[str, int]:
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
        shares = {
            role: max(1, one.in_flight // compute.generators)
            for role, one in models.items()
            if isinstance(one, EndpointSettings)
        }
        self._ctx, self._spec, self._code = ctx, spec, inputs.code
        self._names = {role: one.identity for role, one in models.items()}
        self._host = GeneratorHost(models, shares, spending)
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.warnings: list[str] = []
        self.seeds = _items(ctx.store, read.parts[0])
        self._screen = self._made_screen(read)

    def _made_screen(self, read: Receipt) -> Screen:
        from stillhouse.selection.contamination import NgramIndex

        hashes = read_table(self._ctx.store.path(read.parts[1].path))["hash"].to_numpy()
        languages: frozenset[str] | None = None
        if self._spec.languages == "seeds":
            languages = frozenset(read.info["languages"]) or None
        elif self._spec.languages != "any":
            languages = frozenset(self._spec.languages)
        prompts = [seed["instruction"] for seed in self.seeds]
        return Screen(prompts, NgramIndex(hashes), languages, self._spec.near)

    def run(self, step: str, program: str, items: Sequence[Item]) -> list[Item]:
        """See `Workshop`."""
        size = min(_MAX_ITEMS, max(_MAX_ITEMS // 2, -(-len(items) // 8)))
        spec, compute = self._spec, self._ctx.compute
        tasks = [
            DraftTask(
                spec.generation,
                spec.judge,
                program,
                tuple(items[start : start + size]),
                self._names,
                self._code,
            )
            for start in range(0, len(items), size)
        ]
        if not tasks:
            return []
        work = Step(step, tasks, self._host, compute.generators, compute.generator, "items")
        made: list[Item] = []
        for receipt in perform(self._ctx, work):
            counts = Counter(receipt.counts)
            del counts["items"]
            self.counts += counts
            self._ctx.work[step].tokens += _tokens(counts)
            made += _items(self._ctx.store, receipt.parts[0])
        return made

    def screened(self, items: Sequence[Item], *keys: str) -> list[Item]:
        """See `Workshop`."""
        kept: list[Item] = []
        for item in items:
            reasons = (self._screen.reason(key, item[key]) for key in keys)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                kept.append(item)
            else:
                self.drop(reason, [item])
        return kept

    def drop(self, reason: str, items: Sequence[Item]) -> None:
        """See `Workshop`."""
        if items:
            self.dropped[reason] += len(items)

    def warn(self, text: str) -> None:
        """See `Workshop`."""
        self.warnings.append(text)


def _tokens(counts: Mapping[str, int]) -> int:
    return sum(count for name, count in counts.items() if name.endswith("_tokens"))


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
        "temperature": method.temperature,
        "seed": method.seed,
        "models": {role: one.identity for role, one in models.items()},
    }
    name = fingerprint([GENERATED, LAYOUT_VERSION, method.name, record, made.items])
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
