"""Select, mix and distil training data, and train the target model on what was kept."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "StillhouseError",
    "__version__",
    "open_artifact",
    "open_distilled",
    "open_selection",
    "plan",
    "run",
]

if TYPE_CHECKING:
    from stillhouse.errors import StillhouseError
    from stillhouse.jobs.api import plan, run
    from stillhouse.reading.readers import open_artifact, open_distilled, open_selection

_MODULES = {
    "StillhouseError": "errors",
    "open_artifact": "reading.readers",
    "open_distilled": "reading.readers",
    "open_selection": "reading.readers",
    "plan": "jobs.api",
    "run": "jobs.api",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import stillhouse` stays quick."""
    if name in _MODULES:
        return getattr(import_module(f"stillhouse.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
