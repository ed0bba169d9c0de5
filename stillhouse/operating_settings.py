"""Sections of every spec for those who operate jobs: failures, trackers and prices."""

from typing import Annotated

from pydantic import Field

from stillhouse.settings import Settings


class FailureSettings(Settings):
    """Who is told when `run` ends with an error."""

    webhook_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        description="the environment variable with the address of a webhook, which gets a JSON "
        "object with `text`, `error`, `exit_code`, `run` and `store`; never the address itself"
    )


class TrackSettings(Settings):
    """Trackers of experiments, each an extra; a tracker that fails costs a warning."""

    tensorboard: str | None = Field(default=None, description="a local folder for event files")
    wandb: str | None = Field(
        default=None, description="a project; `WANDB_MODE=offline` keeps runs on this machine"
    )
    mlflow: str | None = Field(
        default=None, description="a tracking URI: a server's address, or a local folder"
    )

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of extras that it needs."""
        return tuple(self.model_dump(exclude_none=True))


class PriceSettings(Settings):
    """What the cluster costs, in any currency."""

    gpu_hour: Annotated[float, Field(ge=0)] = Field(
        default=0, description="of a GPU, with the CPUs beside it"
    )
    cpu_hour: Annotated[float, Field(ge=0)] = Field(
        default=0, description="of a core of a worker without GPU"
    )
    gb_month: Annotated[float, Field(ge=0)] = Field(
        default=0, description="of 10^9 bytes in the store"
    )

    prompt: Annotated[float, Field(ge=0)] = Field(
        default=0, description="of 10^6 tokens that endpoints read, in `job: generate`"
    )
    completion: Annotated[float, Field(ge=0)] = Field(
        default=0, description="of 10^6 tokens that they write"
    )

    def of_calls(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of calls of endpoints."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def of_compute(self, gpu_seconds: float, cpu_seconds: float) -> float:
        """The price of what workers held."""
        return (gpu_seconds * self.gpu_hour + cpu_seconds * self.cpu_hour) / 3600
