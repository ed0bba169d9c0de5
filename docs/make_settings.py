"""Write docs/settings.md from the pydantic models: `python docs/make_settings.py`.

The page has a chapter for each kind of job: a whole example, then a table for each section of its
spec, in the order in which a spec mentions them. Sections that several jobs have come last.
"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stillhouse.classification.spec import ClassifySpec
from stillhouse.custom_code import import_named
from stillhouse.distillation.spec import METHODS, DistillSpec, Method
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generation
from stillhouse.generation.spec import GENERATORS, JUDGES, GenerateSpec
from stillhouse.jobs.chain_spec import ChainSpec
from stillhouse.jobs.sweep_spec import SweepSettings
from stillhouse.mixing.policy import POLICIES, Policy
from stillhouse.mixing.spec import MixSpec
from stillhouse.spec import JobSpec, SelectSpec, Settings
from stillhouse.training.spec import TrainSpec

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "settings.md"
JOBS: dict[str, type[JobSpec]] = {
    "select": SelectSpec,
    "train": TrainSpec,
    "classify": ClassifySpec,
    "mix": MixSpec,
    "distill": DistillSpec,
    "generate": GenerateSpec,
    "chain": ChainSpec,
}

HEADINGS = {"classify": "train, task: classify"}
"""Of specs that are not named by their job alone; the key is that of their example."""
BY_NAME: dict[type[Settings], dict[str, str]] = {
    Policy: POLICIES,
    Method: METHODS,
    Generation: GENERATORS,
    Judge: JUDGES,
}
"""Base classes whose subclasses a section names: short name and place of each."""
SHORT = {
    import_named(name, names): (base.__name__.lower(), name)
    for base, names in BY_NAME.items()
    for name in names
}
"""The key and the short name of each policy and method."""
HEAD = """# Settings

Every key of a spec, by job, made from the settings' classes by `python docs/make_settings.py`.
An unknown key is an error that names the closest known one. `--set a.b=value` overrides a key on
the command line. Sections that more than one job has are [at the end](#shared-sections).
"""


def sections_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def parent_of(model: type[Settings]) -> type[Settings] | None:
    """The settings class whose keys `model` also has; None for a direct subclass of `Settings`."""
    parents = (base for base in model.__bases__ if issubclass(base, Settings))
    parent = next((base for base in parents if base not in (Settings, JobSpec)), None)
    if parent is not None and parent.__name__.startswith("_"):
        return parent_of(parent)
    return parent


def walk(model: type[Settings], path: str, found: dict[type[BaseModel], list[str]]) -> None:
    """Record every section below `model` with the paths of keys that lead to it."""
    for name, field in model.model_fields.items():
        key = f"{path}.{field.alias or name}".lstrip(".")
        for section in sections_in(field.annotation):
            paths = found.setdefault(section, [])
            if key in paths:
                continue
            paths.append(key)
            for short, place in BY_NAME.get(section, {}).items():
                walk_named(import_named(short, {short: place}), key, found)
            walk(section, key, found)
            walk_parents(section, key, found)


def walk_named(section: Any, key: str, found: dict[type[BaseModel], list[str]]) -> None:
    """Record a policy or method, after the classes whose keys it has too."""
    walk_parents(section, key, found)
    if key not in found.setdefault(section, []):
        found[section].append(key)
        walk(section, key, found)


def walk_parents(
    section: type[Settings], key: str, found: dict[type[BaseModel], list[str]]
) -> None:
    parent = parent_of(section)
    if parent is not None and key not in found.setdefault(parent, []):
        walk_parents(parent, key, found)
        found[parent].append(key)


FOUND: dict[str, dict[type[BaseModel], list[str]]] = {job: {} for job in JOBS}
"""By job, its sections, each with the paths of keys that lead to it."""
for _job, _spec in JOBS.items():
    walk(_spec, "", FOUND[_job])
OF_ALL: dict[type[BaseModel], list[str]] = {SweepSettings: ["sweep"]}
"""Sections beside the keys of any job."""
walk(SweepSettings, "sweep", OF_ALL)


def title(model: type[BaseModel]) -> str:
    """Its heading: where it stands in a spec and its class, or `policy: ucb1`."""
    if model in SHORT:
        return ": ".join(SHORT[model])
    found = (OF_ALL, *FOUND.values())
    paths = next(of_job[model] for of_job in found if model in of_job)
    return f"{min(paths, key=len)}: {model.__name__}"


def link(model: type[BaseModel]) -> str:
    if model is JobSpec:
        return "[every job](#every-job)"
    slug = re.sub(r"[^\w\- ]", "", title(model).lower()).replace(" ", "-")
    return f"[{title(model) if model in SHORT else model.__name__}](#{slug})"


def type_text(annotation: Any) -> str:
    """How a field's type reads: `int`, `one of a, b`, a link to another section."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_text(get_args(annotation)[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        parts = [type_text(part) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if origin in (list, tuple, dict):
        inside = [type_text(part) for part in get_args(annotation) if part is not ...]
        return f"{origin.__name__} of {', '.join(inside)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(annotation)
    return getattr(annotation, "__name__", str(annotation))


def default_text(field: FieldInfo) -> str:
    """The default as YAML would have it; empty for sections."""
    if field.default is PydanticUndefined:
        return "required" if field.is_required() else ""
    if field.default is None or isinstance(field.default, BaseModel):
        return ""
    return f"`{field.default}`" if field.default != {} and field.default != [] else "none"


def table(model: type[Settings]) -> str:
    """The keys of a section that its parent does not have, or has otherwise."""
    parent = JobSpec if issubclass(model, JobSpec) and model is not JobSpec else parent_of(model)
    inherited = {} if parent is None else {n: _shown(f) for n, f in parent.model_fields.items()}
    rows: list[str] = []
    for name, field in model.model_fields.items():
        if name == "name" and model in SHORT:
            continue  # it is in the heading
        if inherited.get(name) != _shown(field):
            key, kind, default, description = field.alias or name, *_shown(field)
            rows.append(f"| `{key}` | {kind} | {default} | {description} |")
    lines = ["| key | type | default | |", "|---|---|---|---|", *rows] if rows else []
    if parent is not None and parent is not Policy:  # which has a name alone
        lines += [
            "",
            f"And the keys of {link(parent)}." if rows else f"The keys of {link(parent)}.",
        ]
    return "\n".join(lines).strip()


def _shown(field: FieldInfo) -> tuple[str, str, str]:
    return type_text(field.annotation), default_text(field), field.description or ""


def section(model: type[Settings], paths: list[str]) -> str:
    """A heading, where else a spec has the section, what it is, its keys."""
    others = [path for path in paths if not title(model).startswith(f"{path}: ")]
    shown = ", ".join(f"`{path}`" for path in others[:4]) + ", ..." * (len(others) > 4)
    where = f"Also under {shown}. " if others and model not in SHORT else ""
    return f"\n### {title(model)}\n\n{where}{(model.__doc__ or '').strip()}\n\n{table(model)}\n"


def page() -> str:
    """The whole page."""
    users: dict[type[BaseModel], list[str]] = {}
    for job in JOBS:
        for model in FOUND[job]:
            users.setdefault(model, []).append(job)
    text = HEAD + f"\n## Every job\n\n{(JobSpec.__doc__ or '').strip()}\n\n{table(JobSpec)}\n"
    text += "".join(section(model, paths) for model, paths in OF_ALL.items())
    for job, spec in JOBS.items():
        example = (ROOT / "examples" / f"{job}.yaml").read_text().strip()
        text += f"\n## job: {HEADINGS.get(job, job)}\n\n{(spec.__doc__ or '').strip()}\n\n"
        text += f"```yaml\n{example}\n```\n\n{table(spec)}\n"
        own = {model: paths for model, paths in FOUND[job].items() if users[model] == [job]}
        text += "".join(section(model, paths) for model, paths in own.items())
    text += "\n## Shared sections\n"
    for model, jobs in users.items():
        if len(jobs) > 1:
            paths = [path for job in jobs for path in FOUND[job][model]]
            text += section(model, list(dict.fromkeys(paths)))
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
