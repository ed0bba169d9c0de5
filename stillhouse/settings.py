"""What all settings are made of: the base class, common types, and the refusal of secrets."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of all sections: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )


_SECRET_WORDS = ("secret", "password", "token", "credential", "private", "account_key", "sas")
_SECRET_KEYS = {"key", "access_key", "aws_access_key_id", "connection_string"}


def refuse_secrets(options: dict[str, Any]) -> None:
    """Refuse storage options that look like credentials; these come from the standard chains.

    Raises:
        ValueError: naming the key, never the value.
    """
    for key, value in options.items():
        low = key.lower()
        if low in _SECRET_KEYS or any(word in low for word in _SECRET_WORDS):
            raise ValueError(
                f"`{key}` looks like a secret: use the environment or a profile instead"
            )
        if isinstance(value, dict):
            refuse_secrets(value)
