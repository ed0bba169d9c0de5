"""Settings of the models that a generation asks: in the workers, or behind endpoints."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from stillhouse.data_settings import FROM_SETTING
from stillhouse.settings import Count, Settings, refuse_secrets
from stillhouse.spec import ScoringSettings


class EndpointSettings(Settings):
    """An OpenAI-compatible server."""

    places: ClassVar[frozenset[str]] = frozenset(
        ("url", "key_env", "key_file", "in_flight", "timeout_s", "retries")
    )

    url: str = Field(
        pattern=r"^https?://", description="without `/chat/completions`: http://host:8000/v1"
    )
    model: str = Field(min_length=1, description="its name there, which names its answers, too")
    version: str = Field(default="", description="told apart from others of this name")
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, description="the workers' environment variable with the key; never the key"
    )
    key_file: str | None = Field(default=None, description="or a file on every node")
    in_flight: Count = Field(default=64, description="calls at once, of all generators")
    timeout_s: Annotated[float, Field(gt=0)] = Field(default=120, description="of one call")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=8, description="of a call that was not answered, after growing pauses"
    )
    options: dict[str, Any] = Field(
        default={}, description="further keys of each request, such as `top_p`; never a secret"
    )

    @property
    def identity(self) -> list[Any]:
        """What names its answers."""
        return ["endpoint", self.model, self.version, self.options]

    @model_validator(mode="after")
    def _check(self) -> "EndpointSettings":
        if self.key_env is not None and self.key_file is not None:
            raise ValueError("give either `key_env` or `key_file`")
        refuse_secrets(self.options)
        return self


class GeneratorModel(Settings):
    """A model that writes or judges: exactly one of `path`, `from`, `endpoint`."""

    path: str | None = Field(default=None, description="a transformers folder, URI or hub name")
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    endpoint: EndpointSettings | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "GeneratorModel":
        if sum(one is not None for one in (self.path, self.from_, self.endpoint)) != 1:
            raise ValueError("give exactly one of `path`, `from`, `endpoint`")
        return self


@dataclass(frozen=True, slots=True)
class LocalModelSettings:
    """A model in the store as plain values.

    Attributes:
        digest: of its configuration and weights.
        tokenizer_digest, eos_token, bos_id: of its tokenizer.
        stops: further ids that end an answer.
        max_positions: of its context.
        folder, tokenizer, device, gpus, threads: location and place.
    """

    digest: str
    tokenizer_digest: str
    eos_token: str
    bos_id: int | None
    stops: tuple[int, ...]
    max_positions: int
    scoring: ScoringSettings
    folder: str
    tokenizer: str
    device: str
    gpus: float
    threads: int

    @property
    def identity(self) -> list[Any]:
        names = [self.digest, self.tokenizer_digest, self.eos_token, self.bos_id, self.stops]
        return ["model", *names, self.scoring.dtype]
