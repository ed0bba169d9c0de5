"""Reading a spec: YAML, `--set a.b=c`, and pydantic's complaints as one line each."""

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from stillhouse.errors import SpecError
from stillhouse.jobs.chain_spec import INHERITED, AnySpec, ChainSpec, check_step
from stillhouse.jobs.kinds import SPECS, spec_model
from stillhouse.jobs.sweep_spec import SweepSpec, put_key
from stillhouse.spec import JobSpec
from stillhouse.storage.filesystem import read_bytes

_UNION_MEMBERS = {"float", "int", "str", "bool", "constrained-float"}


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error; by default the second one wins."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key `{key.value}` stands twice in one section",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_spec(path: str, overrides: list[str]) -> AnySpec:
    """Read, override and validate a spec.

    Args:
        path: a local file or fsspec URI.
        overrides: `a.b=value` each, the value read as YAML.

    Raises:
        SpecError: no such file, not YAML, or not a valid spec: one line for each complaint.
    """
    content = _read(path)
    for override in overrides:
        _apply(content, override)
    return parse_spec(content, path)


def parse_spec(content: dict[str, Any], path: str) -> AnySpec:
    """Validate the content of a spec; `path` is where it comes from, for messages.

    Raises:
        SpecError: one line for each complaint.
    """
    jobs = [*SPECS, "chain"]
    known = ", ".join(jobs)
    if "job" not in content:
        raise SpecError(f"{path}: `job` is missing; known: {known}")
    job = content["job"]
    if not isinstance(job, str) or job not in jobs:
        raise SpecError(
            f"{path}: `job: {job}` is not known{_nearest(str(job), jobs)}; known: {known}"
        )
    if "sweep" in content and job == "select" and _are_apart(content):
        raise SpecError(f"{path}: `sweep` beside `targets`: sweep over one `target` at a time")
    if "sweep" in content:
        of = parse_spec({key: one for key, one in content.items() if key != "sweep"}, path)
        return _validated(SweepSpec, {"of": of, "sweep": content["sweep"]}, path)
    if job == "select" and _are_apart(content):
        content, job = by_target(content, path), "chain"
    elif job == "chain" and isinstance(content.get("steps"), dict):
        content = content | {"steps": _steps(content["steps"], path)}
    try:
        model = ChainSpec if job == "chain" else spec_model(content)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    return _validated(model, content, path)


def _are_apart(content: dict[str, Any]) -> bool:
    """Whether a `select` has `targets` without weights: a selection for each."""
    targets = content.get("targets")
    if not isinstance(targets, dict):
        return False
    weighted = [isinstance(one, dict) and "weight" in one for one in targets.values()]
    return bool(targets) and not any(weighted)


def by_target(content: dict[str, Any], path: str) -> dict[str, Any]:
    """A `select` with `targets` as a chain: a step of the target's name for each.

    Tokens, prior and the prior's scores do not depend on the target, so the first step makes them
    for all.

    Raises:
        SpecError: `target` beside it, or a wrong spec.
    """
    targets: dict[str, Any] = content["targets"]
    if "target" in content:
        raise SpecError(f"{path}: give either `target` or `targets`")
    of_all = {key: content[key] for key in (*INHERITED, "compute", "name") if key in content}
    shared = {key: one for key, one in content.items() if key not in {*of_all, "targets"}}
    steps: dict[str, JobSpec] = {}
    for name, target in targets.items():
        step = shared | {"target": target}
        if shared.get("publish") is not None:
            step["publish"] = f"{shared['publish']}-{name}"
        steps[name] = parse_spec(step, f"{path}: targets.{name}")
    return {"job": "chain", **of_all, "steps": steps}


def _validated(model: type[Any], content: dict[str, Any], path: str) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [_line(model, detail) for detail in error.errors()]
        raise SpecError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


def _steps(steps: dict[str, Any], path: str) -> dict[str, JobSpec]:
    """The steps of a chain, whose complaints name them."""
    for name, content in steps.items():
        try:
            check_step(name, content)
        except ValueError as error:
            raise SpecError(f"{path}: {error}") from None
        if content["job"] == "select" and _are_apart(content):
            raise SpecError(
                f"{path}: `steps.{name}.targets`: make each a step with its `target`, or give them "
                "weights for one selection"
            )
    return {name: parse_spec(content, f"{path}: steps.{name}") for name, content in steps.items()}


def _read(path: str) -> dict[str, Any]:
    try:
        data = read_bytes(path) if "://" in path else Path(path).read_bytes()
    except FileNotFoundError:
        raise SpecError(f"spec {path!r}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise SpecError(f"spec {path!r}: {error.strerror}") from None
    try:
        content = _Loader(data).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not UTF-8 text"
        raise SpecError(f"{path}{line}: not YAML: {problem}") from None
    if not isinstance(content, dict):
        raise SpecError(f"{path}: a spec is a YAML mapping that starts with `job:`")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into the spec; every step but the last must be a section."""
    path, equals, value = override.partition("=")
    if not equals or not all(path.split(".")):
        raise SpecError(f"--set {override!r}: write it as a.b=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SpecError(f"--set {override!r}: {value!r} is not a YAML value") from None
    put_key(content, path, parsed, f"--set {override!r}")


def _line(spec: type[BaseModel], detail: ErrorDetails) -> str:
    """One complaint: key path, value, what is allowed, the nearest known key."""
    steps, known = _written_path(spec, detail["loc"])
    place = ".".join(map(str, steps))
    match detail["type"]:
        case "extra_forbidden":
            near = _nearest(str(detail["loc"][-1]), known)
            return f"unknown key `{place}`{near}; known here: {', '.join(known)}"
        case "missing":
            return f"`{place}` is missing"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"`{place}`: {message}" if place else message
        case _:
            value = repr(detail["input"])
            shown = value if len(value) <= 60 else value[:57] + "..."
            message = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
            if detail["type"] == "model_type":
                message = "input should be a section, with keys of its own"
            return f"`{place}`: {shown}: {message}"


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean `{found[0]}`?)" if found else ""


def _written_path(
    spec: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[list[int | str], list[str]]:
    """A location as the user wrote it, without pydantic's names of union members.

    Returns:
        Its steps, and the keys of the section that the last of them is in.
    """
    steps: list[int | str] = []
    models: list[type[BaseModel]] = [spec]
    fields: dict[str, FieldInfo] = {}
    is_key = False  # of a mapping
    for position, step in enumerate(loc):
        fields = {f.alias or n: f for model in models for n, f in model.model_fields.items()}
        is_member = "[" in str(step) or str(step) in _UNION_MEMBERS
        if is_key:
            steps.append(step)
            is_key = False
        elif step in fields:
            steps.append(step)
            annotation = fields[str(step)].annotation
            models, is_key = _models(annotation), get_origin(annotation) is dict
        elif isinstance(step, int) or (position == len(loc) - 1 and models and not is_member):
            steps.append(step)
    return steps, sorted(fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes inside an annotation such as `float | DataSource`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, dict):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []
