"""What a spec names by `from`: a step of a chain, or a run whose artifact the section takes."""

from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

from stillhouse.settings import Settings

S = TypeVar("S", bound=Settings)
Change: TypeAlias = Callable[[Settings, str, str], Mapping[str, str | None]]
"""From a section with `from`, the section's key and the name to the section's changed fields."""
_ARTIFACTS_OF_RUNS = {
    "data": ("selection", "generated"),
    "pool": ("generated",),
    "init": ("model",),
    "teachers": ("model",),
    "model": ("model",),
    "strong": ("model",),
    "student": ("model",),
    "network": ("model",),
    "policy": ("model",),
    "prior": ("prior", "model"),
    "conditional": ("conditional", "model"),
    "tokenizer": ("tokenizer",),
    "weight": ("weights",),
}
"""By the section with `from`: which of a run's artifacts it takes, the first that exists."""


def with_names(spec: S, uris: Mapping[str, str]) -> S:
    """The spec with a URI in place of each `from` that is a name in `uris`."""
    return each_from(spec, lambda _, __, name: {"from_": uris.get(name, name)})


def inputs_by_name(spec: Settings) -> list[tuple[str, str]]:
    """The section and the text of every `from`."""
    found: list[tuple[str, str]] = []

    def note(_: Settings, section: str, name: str) -> dict[str, str | None]:
        found.append((section, name))
        return {}

    each_from(spec, note)
    return found


def artifacts_of(section: str) -> tuple[str, ...]:
    """The artifacts of a run, by their keys in its result, of which a section takes the first."""
    return _ARTIFACTS_OF_RUNS[section]


def each_from(spec: S, change: Change, section: str = "data") -> S:
    """The spec with what `change` makes of every section that has a `from`."""
    changes: dict[str, object] = {}
    for name in type(spec).model_fields:
        value, inner = getattr(spec, name), name if name in _ARTIFACTS_OF_RUNS else section
        if isinstance(value, Settings):
            made: object = each_from(value, change, inner)
        elif isinstance(value, list) and any(isinstance(one, Settings) for one in value):
            made = [
                each_from(one, change, inner) if isinstance(one, Settings) else one for one in value
            ]
        else:
            continue
        changes |= {name: made} if made != value else {}
    name = getattr(spec, "from_", None)
    changes |= change(spec, section, name) if name is not None else {}
    return spec.model_copy(update=changes) if changes else spec
