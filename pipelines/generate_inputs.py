"""What `job: generate` reads: seeds, held-out text, models and code of the user's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.custom_code import CustomCode, find_named
from stillhouse.data_settings import DataSource
from stillhouse.generation.asking import Role
from stillhouse.generation.model_settings import EndpointSettings, LocalModelSettings
from stillhouse.generation.seeds import SeedFiles
from stillhouse.generation.spec import GENERATORS, JUDGES, GenerateSpec
from stillhouse.generation.task import NamedSettings
from stillhouse.models.shape import model_uri
from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import Needs, given_models, model_identity
from stillhouse.pipelines.inputs import list_source
from stillhouse.pipelines.tokenizer import given_tokenizer
from stillhouse.pipelines.train_data import prompt_columns
from stillhouse.storage.artifact import Store
from stillhouse.storage.digests import digest_files
from stillhouse.storage.filesystem import FileInfo, join, read_bytes
from stillhouse.storage.task import identity
from stillhouse.text.tokenizer import load_tokenizer

_NO_LIMIT = 1 << 30
"""Of a context whose positions are not counted."""


@dataclass(frozen=True, slots=True)
class GenerateInputs:
    """All that a generation reads, by content.

    Attributes:
        seeds, heldout: files.
        models: fingerprints of the given ones, by role.
        method, judge: as workers build them.
        num_bytes: of the seeds.
    """

    seeds: SeedFiles
    heldout: tuple[SeedFiles, ...]
    models: dict[Role, str]
    method: NamedSettings
    judge: NamedSettings
    num_bytes: int

    def identity(self) -> list[Any]:
        files = [[one.settings, one.digests] for one in (self.seeds, *self.heldout)]
        return [files, self.models, identity([self.method, self.judge])]


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
    for path in paths.values():
        load_tokenizer(path, None)  # or refuse it before any work
    size = sum(one.size_bytes for one in files[0])
    method, judge = (
        NamedSettings.of(made, code)
        for made, code in zip((spec.generation, spec.judge), _codes(spec), strict=True)
    )
    return GenerateInputs(sources[0], tuple(sources[1:]), identities, method, judge, size)


def _files(store: Store, source: DataSource, found: list[FileInfo], remember: bool) -> SeedFiles:
    source = source.model_copy(update={"columns": prompt_columns(source, found[0].uri)})
    digests = digest_files(store, found, remember=remember)
    return SeedFiles(
        source,
        source.identity(),
        tuple(one.sha256 for one in digests),
        tuple(one.uri for one in found),
    )


def own_code(spec: GenerateSpec) -> list[CustomCode]:
    """The code of a method or judge of the user's.

    Raises:
        SpecError: it is not here, or is too large.
    """
    return [one for one in _codes(spec) if one is not None]


def _codes(spec: GenerateSpec) -> list[CustomCode | None]:
    named = [("generation.name", spec.generation.name, GENERATORS)]
    named += [("judge.name", spec.judge.name, JUDGES)]
    return [None if name in table else find_named(key, name) for key, name, table in named]


def given_paths(spec: GenerateSpec) -> dict[Role, str]:
    """The models that are given by path, by role."""
    return {role: one.path for role, one in spec.models.items() if one.path is not None}


def generator_models(
    ctx: Context, spec: GenerateSpec
) -> dict[Role, LocalModelSettings | EndpointSettings]:
    """The models by role; those given by path are put into the store."""
    paths = given_paths(spec)
    made = given_models(ctx, paths, Needs())
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
            _stops(model_uri(paths[role])),
            shape.max_positions or _NO_LIMIT,
            spec.scoring,
            made[role].folder,
            tokenizer.path,
            ctx.compute.device,
            ctx.compute.gpus_of(ctx.compute.generator),
            ctx.compute.threads_per_worker,
        )
    return models


def _stops(folder: str) -> tuple[int, ...]:
    """The ids that end an answer by `generation_config.json`, where a model has one."""
    try:
        found = json.loads(read_bytes(join(folder, "generation_config.json"))).get("eos_token_id")
    except FileNotFoundError:
        return ()
    return tuple(sorted(found)) if isinstance(found, list) else () if found is None else (found,)
