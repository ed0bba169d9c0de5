"""`stillhouse schema`: the JSON Schema of specs, which editors complete and check YAML with."""

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from stillhouse.custom_code import import_named
from stillhouse.data_settings import PoolSource, TargetSource
from stillhouse.distillation.spec import METHODS, Method
from stillhouse.errors import MissingExtraError, SpecError
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generation
from stillhouse.generation.spec import GENERATORS, JUDGES
from stillhouse.jobs.chain_spec import ChainSpec
from stillhouse.jobs.kinds import SPECS, TASKS
from stillhouse.jobs.sweep_spec import SweepSettings
from stillhouse.mixing.policy import POLICIES, Policy
from stillhouse.settings import STEP_NAME
from stillhouse.spec import JobSpec, SelectSpec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_CLASSES: dict[str, list[type[JobSpec]]] = {
    **{job: [spec] for job, spec in SPECS.items()},
    "train": [*TASKS.values()],
    "chain": [ChainSpec],
}
_NAMED: dict[type[Any], tuple[Mapping[str, str], str | None]] = {
    Policy: (POLICIES, None),
    Method: (METHODS, None),
    Generation: (GENERATORS, "codec"),
    Judge: (JUDGES, "pairwise"),
}
"""Sections that are settings of the class that their `name` names, with the built-in classes and
the default.
"""
_DEFAULT_TASK = next(iter(TASKS))


def schema(job: str | None = None) -> dict[str, Any]:
    """The schema of specs of one job, or of all.

    It knows names, types and bounds of keys. What depends on several of them, and the settings of
    classes of a user's own, are left to `plan`.

    Raises:
        SpecError: no such job.
    """
    if job is not None and job not in _CLASSES:
        raise SpecError(f"no job is called {job!r}: there are {', '.join(_CLASSES)}")
    jobs = [job] if job else [*_CLASSES]
    known = {name: _CLASSES[name] for name in _CLASSES if name in jobs or "chain" in jobs}
    classes = [one for found in known.values() for one in found]
    parts = _definitions([*classes, SweepSettings])
    for base, (table, default) in _NAMED.items():
        if base.__name__ in parts:
            named = _built_in(table)
            parts |= _definitions([*named.values()])
            parts[base.__name__] = _by_name(table, named, default)
    steps = [name for name in known if name != "chain"]
    for name in steps:
        for one in known[name]:
            parts[one.__name__]["properties"]["sweep"] = _ref(SweepSettings)
    if "select" in known:
        _loosen_targets(parts)
        parts[PoolSource.__name__]["oneOf"] = [{"required": [key]} for key in ("path", "from")]
    if "chain" in known:
        step = _by_job({name: known[name] for name in steps})
        parts[ChainSpec.__name__]["properties"]["steps"] |= {
            "patternProperties": {STEP_NAME: step},
            "additionalProperties": False,
        }
    return {
        "$schema": _DIALECT,
        "title": f"Stillhouse: {f'`job: {job}`' if job else 'a job'}",
        **_by_job({name: known[name] for name in jobs}),
        "$defs": parts,
    }


def _loosen_targets(parts: dict[str, Any]) -> None:
    """Either `target` or `targets`, whose members have weights or not."""
    parts[SelectSpec.__name__]["oneOf"] = [{"required": [key]} for key in ("target", "targets")]
    several = parts[SelectSpec.__name__]["properties"]["targets"]
    [member] = several.pop("patternProperties").values()
    several |= {
        "patternProperties": {STEP_NAME: {"anyOf": [member, _ref(TargetSource)]}},
        "additionalProperties": False,
        "minProperties": 1,
    }


def _definitions(classes: list[type[Any]]) -> dict[str, Any]:
    _, whole = models_json_schema([(one, "validation") for one in classes])
    found: dict[str, Any] = whole.get("$defs", {})
    return found


def _built_in(table: Mapping[str, str]) -> dict[str, type[Any]]:
    """The classes of a table; none where they need an extra that is not installed."""
    try:
        return {name: import_named(name, table) for name in table}
    except MissingExtraError:
        return {}


def _by_name(
    table: Mapping[str, str], classes: dict[str, type[Any]], default: str | None
) -> dict[str, Any]:
    """A section that is one of the classes, or of a user's own `package.module:Class`."""
    chosen: list[dict[str, Any]] = []
    for name, one in classes.items():
        needed = [] if name == default else ["name"]
        asked = {"properties": {"name": {"const": name}}, "required": needed}
        chosen.append({"if": asked, "then": _ref(one)})
    names = [{"enum": [*table]}, {"type": "string", "pattern": ":"}]
    section: dict[str, Any] = {"type": "object", "properties": {"name": {"anyOf": names}}}
    section |= {} if default else {"required": ["name"]}
    return section | ({"allOf": chosen} if chosen else {})


def _by_job(classes: dict[str, list[type[JobSpec]]]) -> dict[str, Any]:
    """A schema that chooses the class of a spec by `job` and `task`."""
    choices: list[dict[str, Any]] = []
    for job, found in classes.items():
        for one in found:
            asked: dict[str, Any] = {"properties": {"job": {"const": job}}}
            if len(found) > 1:
                task = next(name for name, spec in TASKS.items() if spec is one)
                asked["properties"]["task"] = {"const": task}
                asked["required"] = [] if task == _DEFAULT_TASK else ["task"]
            choices.append({"if": asked, "then": _ref(one)})
    return {
        "type": "object",
        "properties": {"job": {"enum": [*classes]}},
        "required": ["job"],
        "allOf": choices,
    }


def _ref(one: type[Any]) -> dict[str, str]:
    return {"$ref": f"#/$defs/{one.__name__}"}
