"""The section `compute:` of specs: where a job runs, and with how many workers and GPUs."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stillhouse.settings import Count, Settings


class WorkerSettings(Settings):
    """Requirements of one kind of actor on its node."""

    gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of each; a fraction shares one; default `gpus_per_worker`"
    )
    accelerator: str | None = Field(
        default=None, description="Ray's name of the accelerator, such as `H100` or `A10G`"
    )
    labels: dict[str, str] = Field(
        default={},
        description="of its node: `ray.io/market-type: spot` (or `on-demand`), a pool of your own",
    )


class ComputeSettings(Settings):
    """Where the job runs and how wide; never part of any identity."""

    address: str | None = Field(
        default=None, description="of a Ray cluster; default RAY_ADDRESS, or local"
    )
    scorers: Count = Field(default=2, description="Scorer actors")
    trainers: Count = Field(
        default=1,
        description="workers of a training; as many small ones as these are trained one a worker",
    )
    min_trainers: Count | None = Field(
        default=None, description="a training goes on with as few when nodes are lost; default all"
    )
    wait_s: Annotated[float, Field(ge=0)] = Field(
        default=600, description="for a cluster that is too small, before giving up"
    )
    experts: Count = Field(default=2, description="distil: experts or teachers trained at once")
    distillers: Count = Field(default=1, description="distil: workers that share every batch")
    evaluators: Count = Field(default=2, description="distil: networks trained on sets at once")
    generators: Count = Field(default=2, description="generate: actors that host or ask models")
    packers: Count | None = Field(
        default=None, description="tokenising tasks at once; default all cores"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    scorer: WorkerSettings = WorkerSettings()
    generator: WorkerSettings = Field(
        default=WorkerSettings(), description="generate; of models behind endpoints: `gpus: 0`"
    )
    trainer: WorkerSettings = Field(
        default=WorkerSettings(), description="workers of trainings; distil: all its workers"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    threads_per_worker: Count = Field(default=1, description="torch threads of an actor on the CPU")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where a GPU was asked for, else cpu"
    )
    max_attempts: Count = Field(
        default=3, description="a part that kills its worker this often is given up"
    )

    @field_validator("device", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("cuda:"):
            raise ValueError(
                "Ray gives each worker its GPUs: set `cuda`, and `CUDA_VISIBLE_DEVICES` where Ray "
                "is started to leave some out"
            )
        return value

    def gpus_of(self, worker: WorkerSettings) -> float:
        return self.gpus_per_worker if worker.gpus is None else worker.gpus

    @property
    def trainer_gpus(self) -> float:
        """GPUs of each training worker."""
        return self.gpus_of(self.trainer)

    @property
    def needed_by_trainer(self) -> dict[str, float]:
        """The resource that each training worker takes: GPUs, else CPUs."""
        gpus = self.trainer_gpus
        return {"GPU": gpus} if gpus else {"CPU": self.cpus_per_worker}

    def resources(self, gpus: float) -> dict[str, float]:
        """Ray's options for an actor; one without GPUs has `cpus_per_worker`."""
        return {"num_cpus": 0 if gpus else self.cpus_per_worker, "num_gpus": gpus}


def device_type(device: str, gpus: float) -> Literal["cpu", "cuda"]:
    """`compute.device` with `auto` resolved: cuda if GPUs are requested, else cpu."""
    return "cuda" if device == "cuda" or (device == "auto" and gpus > 0) else "cpu"


def group_backend(device: str, gpus: float) -> Literal["gloo", "nccl"]:
    """The backend of torch.distributed; NCCL does not work with two workers on one GPU."""
    return "nccl" if device == "cuda" and gpus >= 1 else "gloo"
