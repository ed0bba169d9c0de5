"""Errors that Stillhouse raises, each with an exit code of the command line.

Exit codes: 2 bad spec or usage, 3 bad input data, 4 stopped but resumable, 1 anything else.
A message has the offending value, the place, and the key or command that fixes it.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any


class StillhouseError(Exception):
    """Base of every error that Stillhouse raises on purpose."""

    exit_code = 1
    details: Mapping[str, Any] = {}
    """What `--json` says beside the message."""


class SpecError(StillhouseError):
    """The job spec is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2


EXTRAS = {
    "ray": "ray",
    "aiohttp": "ray",
    "requests": "ray",
    "torch": "train",
    "transformers": "train",
    "tokenizers": "train",
    "safetensors": "train",
    "datasets": "train",
    "huggingface_hub": "train",
    "PIL": "train",
    "s3fs": "s3",
    "gcsfs": "gcs",
    "adlfs": "azure",
    "optuna": "sweep",
    "sklearn": "sweep",
    "scipy": "sweep",
    "peft": "lora",
    "lm_eval": "eval",
    "lance": "lance",
    "warcio": "warc",
    "resiliparse": "warc",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "openai": "generate",
    "py3langid": "generate",
}
"""The extra of this package that installs a module."""


def require(*modules: str) -> None:
    """Check that modules of `EXTRAS` are installed, without importing them.

    Raises:
        MissingExtraError: naming all extras that are missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS[module] for module in missing))
        raise MissingExtraError(
            f"{', '.join(missing)}: not installed: pip install 'stillhouse[{extras}]'"
        )


class MissingExtraError(StillhouseError):
    """The job needs a package that is not installed."""

    exit_code = 2

    @classmethod
    def of(cls, error: ImportError) -> "MissingExtraError | None":
        """The error that names the extra of a module that could not be imported; None for a module
        without one. fsspec's ImportError has the module in its cause.
        """
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        extra = EXTRAS.get((cause.name or "").partition(".")[0])
        if extra is None:
            return None
        return cls(f"`{cause.name}` is not installed: pip install 'stillhouse[{extra}]'")


class InputError(StillhouseError):
    """The input data are wrong: no files, a missing column, too many bad rows, an empty pool."""

    exit_code = 3


class BadFileError(InputError):
    """One input file cannot be read: truncated, not what its suffix says."""


class ModelError(StillhouseError):
    """A model or tokenizer does not exist or does not fit the rest of the spec."""

    exit_code = 2


class BudgetError(StillhouseError):
    """A selection cannot be made: more requested than the pool holds, quotas that contradict."""

    exit_code = 2


class StorageError(StillhouseError):
    """The store cannot be used: no access, no bucket, out of retries. Run again later."""

    exit_code = 4


class StoreUnreachableError(StorageError):
    """The store did not answer until the last retry; on another machine, or later, it may."""


class UnsafeStoreError(StillhouseError):
    """The store's filesystem lets two writers create one name, so commits are not safe there."""

    exit_code = 2


class ArtifactError(StillhouseError):
    """A manifest or part is missing, broken, of another kind or of a newer version."""

    exit_code = 3


class PartFailedError(StillhouseError):
    """A part killed its worker in every attempt that `compute.max_attempts` allows."""

    exit_code = 4


class CustomCodeError(StillhouseError):
    """A class of the user's that a spec names raised, or returned what cannot be used."""


class DivergedError(StillhouseError):
    """A training loss became NaN or infinite, or rose steeply."""

    exit_code = 4


class EndpointError(StillhouseError):
    """A model's endpoint does not answer, or not by its protocol. Run again later."""

    exit_code = 4


class EndpointRefusedError(StillhouseError):
    """A model's endpoint does not accept the key, or knows no such model."""

    exit_code = 2


class SpentError(StillhouseError):
    """A budget of calls or tokens is spent; raised, the job goes on where it stopped."""

    exit_code = 4


class StoppedEarlyError(StillhouseError):
    """A sweep stopped a variant, which is worse than others; run by hand, it goes on from there."""

    exit_code = 4


class StepFailedError(StillhouseError):
    """A step of a chain failed; its exit code is the step's own."""

    def __init__(self, message: str, exit_code: int, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.exit_code, self.details = exit_code, details


class ClusterError(StillhouseError):
    """A Ray cluster cannot be used: no answer, a refused token, or another version of Ray."""

    exit_code = 2


class LostPeerError(RuntimeError):
    """A sum over workers failed because another worker is gone, which is the actual cause."""


class LostClusterError(ClusterError):
    """The cluster was lost while a job was followed. Submit again to resume."""

    exit_code = 4
