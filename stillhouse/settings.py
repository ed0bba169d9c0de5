"""The base class of settings, common types, and the refusal of secrets."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
T = TypeVar("T")
STEP_NAME = r"^[a-z][a-z0-9_-]{0,39}$"
StepName = Annotated[str, Field(pattern=STEP_NAME)]
"""Of a step of a chain, or of a target, which may become one."""


def _list_form(value: Any) -> str:
    """Which member of a union with a list is meant: its mistakes alone are shown."""
    return "[list]" if isinstance(value, list) else "[one]"


OneOrMore: TypeAlias = Annotated[
    Annotated[T, Tag("[one]")] | Annotated[list[T], Tag("[list]")], Discriminator(_list_form)
]
"""A value, or a list of them."""


def allowed_rows(limit: float, count: int) -> float:
    """How many of `count` rows may be bad by a setting `max_bad_rows`: a share below 1, else a
    count.
    """
    return limit * count if limit < 1 else limit


class Settings(BaseModel):
    """Base of all sections of a spec: frozen, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )

    places: ClassVar[frozenset[str]] = frozenset()
    """Keys that change no result: where something is, or how much at once."""


def without_removed(content: Any, key: str, meant: Sequence[Any], instead: str) -> Any:
    """A section without a removed key, whose values `meant` ask for the present behaviour.

    Raises:
        ValueError: another value, with the advice `instead`.
    """
    if not isinstance(content, dict) or key not in content:
        return content
    left = {**content}
    value = left.pop(key)
    if value not in meant:
        raise ValueError(f"`{key}: {value}` was removed: {instead}")
    return left


_SECRET_PARTS = ("secret", "passw", "credential", "private", "accountkey", "accesskey", "apikey")
_SECRET_KEYS = {"key", "sas", "connectionstring", "awsaccesskeyid", "authorization"}
_TEXT_TOKENS = re.compile(r"(eos|bos|pad|unk|mask|sep|cls|stop|start|end|special)_?token", re.I)
_TOKEN_SOURCES = {"anon", "browser", "cache", "cloud", "google_default"}
"""Values of gcsfs's option `token` that are not secrets."""
_SIGNED = re.compile(r"[?&](x-(amz|goog)-(signature|credential|security-token)|sig)=", re.I)
_WITH_PASSWORD = re.compile(r"^[a-z][a-z0-9+.-]*://[^/?#@]*:[^/?#@]+@", re.I)


def refuse_secrets(options: dict[str, Any]) -> None:
    """Refuse options that look like credentials, which should come from the standard chains.

    Raises:
        ValueError: naming the key, never the value.
    """
    for key, value in options.items():
        if _is_secret(key, value):
            raise ValueError(
                f"`{key}` looks like a secret: use the environment or a profile instead"
            )
        if isinstance(value, dict):
            refuse_secrets(value)
        else:
            refuse_secret_urls(value, key)


def _is_secret(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    plain = re.sub("[^a-z]", "", key.lower())
    if plain in _SECRET_KEYS or any(part in plain for part in _SECRET_PARTS):
        return True
    is_token = re.search("(token|Token|TOKEN)$", key) is not None or plain == "sastoken"
    if not is_token or isinstance(value, int | float) or _TEXT_TOKENS.fullmatch(key):
        return False
    return not (isinstance(value, str) and value in _TOKEN_SOURCES)


def refuse_secret_urls(value: Any, key: str) -> None:
    """Refuse URLs that hold a password or a signature, anywhere in a JSON value.

    Raises:
        ValueError: naming the key, never the value.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse_secret_urls(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_secret_urls(inner, key)
    elif isinstance(value, str) and (_WITH_PASSWORD.search(value) or _SIGNED.search(value)):
        raise ValueError(
            f"the URL of `{key}` holds a password or a signature, which would be stored: use the "
            "environment or a profile instead"
        )
