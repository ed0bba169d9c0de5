"""Select, mix and distil training data, and train the target model on what was kept."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "open_artifact", "open_distilled", "open_selection"]

if TYPE_CHECKING:
    from stillhouse.reading.distilled import open_distilled
    from stillhouse.reading.readers import open_artifact, open_selection


def __getattr__(name: str) -> Any:
    """Import the public readers on first use, so that `import stillhouse` stays quick."""
    if name in {"open_artifact", "open_selection"}:
        return getattr(import_module("stillhouse.reading.readers"), name)
    if name == "open_distilled":
        return import_module("stillhouse.reading.distilled").open_distilled
    raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
