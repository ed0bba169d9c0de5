"""Write docs/settings.md from the pydantic models: `python docs/make_settings.py`."""

import types
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stillhouse import compute_settings, data_settings, spec, tokenizer_settings
from stillhouse.distillation import decoupled, images, matching, method, recipes
from stillhouse.distillation import spec as distill_spec
from stillhouse.distillation.method import METHODS
from stillhouse.mixing import policy as mix_policy
from stillhouse.mixing import spec as mix_spec
from stillhouse.selection import own_settings
from stillhouse.training import spec as train_spec

_NAMES = {place: name for name, place in mix_policy.POLICIES.items()}
_POLICIES = dict.fromkeys(import_module(place.partition(":")[0]) for place in _NAMES)
_METHODS = [import_module(name.partition(":")[0]) for name in METHODS.values()]
_DISTILLATION = dict.fromkeys(
    [distill_spec, images, method, matching, decoupled, *_METHODS, recipes]
)
MODULES = (
    spec,
    data_settings,
    tokenizer_settings,
    compute_settings,
    own_settings,
    train_spec,
    mix_spec,
    mix_policy,
    *_POLICIES,
    *_DISTILLATION,
)
PAGE = Path(__file__).parent / "settings.md"
HEAD = """# Settings

Every key of a spec, made from the settings' classes by `python docs/make_settings.py`. A key that
is not here is refused. `--set a.b=value` overrides one on the command line.
"""


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
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return getattr(annotation, "__name__", str(annotation))


def default_text(field: FieldInfo) -> str:
    """The default as YAML would have it; empty for sections."""
    if field.default is PydanticUndefined:
        return "required" if field.is_required() else ""
    if field.default is None or isinstance(field.default, BaseModel):
        return ""
    return f"`{field.default}`" if field.default != {} and field.default != [] else "none"


def section(model: type[BaseModel]) -> str:
    """One table: the keys of a settings class."""
    is_job = issubclass(model, spec.JobSpec) and model is not spec.JobSpec
    short = _NAMES.get(f"{model.__module__}:{model.__name__}")
    rows = [f"| `name` | `{short}` | required | |"] * (short is not None)
    rows += [
        f"| `{field.alias or name}` | {type_text(field.annotation)} | {default_text(field)} "
        f"| {field.description or ''} |"
        for name, field in model.model_fields.items()
        if not (is_job and name in spec.JobSpec.model_fields) and not (short and name == "name")
    ]
    about = (model.__doc__ or "").strip() + " Besides the keys of JobSpec:" * is_job
    table = "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows])
    return f"\n## {model.__name__}\n\n{about}\n\n{table}\n"


def page() -> str:
    """The whole page, the job first."""
    models = [
        value
        for module in MODULES
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, spec.Settings)
        and value is not spec.Settings
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and value is not mix_policy.RewardPolicy
    ]
    models.sort(key=lambda model: not issubclass(model, spec.JobSpec))
    return HEAD + "".join(section(model) for model in models)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
