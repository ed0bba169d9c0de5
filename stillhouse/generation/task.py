"""The work of generators: programs of a method for some items, with the models they ask."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from stillhouse.custom_code import CustomCode, import_code, import_named
from stillhouse.generation.asking import Asker, Backend, Item, Role, Spending
from stillhouse.generation.endpoint import Endpoint
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generation
from stillhouse.generation.model_settings import EndpointSettings, LocalModelSettings
from stillhouse.generation.spec import GENERATORS, JUDGES
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import Output, Task

DRAFTS = "drafts"


@dataclass(frozen=True, slots=True)
class GeneratorHost:
    """Settings of a worker's host.

    Attributes:
        models: by role.
        in_flight: calls of an endpoint at once, of one worker.
        spending: counts for all workers.
    """

    models: Mapping[Role, LocalModelSettings | EndpointSettings]
    in_flight: Mapping[Role, int]
    spending: Spending = field(compare=False)

    def build(self, store: Store) -> "Generator":
        return Generator(store, self)


class Generator:
    """Keeps the models of a worker, each loaded once even where it has two roles."""

    def __init__(self, store: Store, settings: GeneratorHost) -> None:
        self._store, self._spending = store, settings.spending
        made: dict[str, Backend] = {}
        self.backends: dict[Role, Backend] = {}
        for role, model in settings.models.items():
            key = repr(model)
            if key not in made:
                made[key] = _backend(model, settings.in_flight.get(role, 1))
            self.backends[role] = made[key]

    def asker(self) -> Asker:
        return Asker(self._store, self.backends, self._spending)


def _backend(model: LocalModelSettings | EndpointSettings, in_flight: int) -> Backend:
    if isinstance(model, EndpointSettings):
        return Endpoint(model, in_flight)
    from stillhouse.generation.local_model import LocalModel

    return LocalModel(model)


@dataclass(frozen=True, slots=True)
class NamedSettings:
    """A method or judge as plain values, which a worker builds it from.

    Attributes:
        name: as in the spec.
        prompts: version of its prompts.
        code: where it is the user's.
    """

    name: str
    values: dict[str, Any]
    prompts: str
    code: CustomCode | None = None

    @classmethod
    def of(cls, made: Generation | Judge, code: CustomCode | None) -> "NamedSettings":
        values = made.model_dump(mode="json", exclude={"model"})  # which the host has
        return cls(made.name, values, made.prompts, code)

    def build(self, table: Mapping[str, str]) -> Any:
        """The settings object; the user's class is imported from `code` alone."""
        if self.code is None:
            return import_named(self.name, table).model_validate(self.values)
        module, _, wanted = self.name.partition(":")
        return getattr(import_code(self.code, module), wanted).model_validate(self.values)


@dataclass(frozen=True)
class DraftTask(Task):
    """Run a program of a method for some items.

    Its part has a row for each item, as JSON; it counts items and calls (`Asker.counts`).

    Attributes:
        method: whose `program` is run.
        models: what identifies the models, by role.
    """

    KIND = DRAFTS

    method: NamedSettings
    judge: NamedSettings
    program: str
    items: tuple[Item, ...]
    models: dict[str, list[Any]]

    def run(self, store: Store, host: Generator, loaded: Any) -> Output:
        judge, method = self.judge.build(JUDGES), self.method.build(GENERATORS)
        asker = host.asker()
        program = getattr(method, self.program)
        made = asker.run(program(item, judge) for item in self.items)
        table = pa.table({"item": [json.dumps(one, ensure_ascii=False) for one in made]})
        return Output([table], {"items": len(made), **asker.counts})
