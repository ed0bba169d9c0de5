"""The settings of the distillation methods, `method: {name: ...}`; defaults as published.

Trajectory matching (`mtt`, `tesla`, `ftd`, `datm`, `ast`) shares its keys, and differs in which of
them are on. The decoupled methods (`sre2l`, `infer`, `rded`, `nrr_dd`) have their own.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from stillhouse.distillation.settings import (
    CompensatorSettings,
    CriticalPatchSettings,
    DistanceSettings,
    PatchSettings,
    RecoverSettings,
    RefineSettings,
)
from stillhouse.spec import Count, Settings

_Positive = Annotated[float, Field(gt=0)]
LabelKind = Literal["classes", "static", "views", "distances"]


class ImagesPerClass(Settings):
    """What every method is asked for."""

    images_per_class: Count = Field(description="the budget, in real images of each class")
    seed: int = Field(default=0, description="of start images, draws and noise")


class TrajectoryMethod(ImagesPerClass):
    """Synthetic images whose training follows where experts went."""

    num_iterations: Count = Field(default=5_000, description="updates of the images")
    num_steps: Count = Field(default=30, description="N, steps of the student an iteration")
    expert_epochs: Count = Field(default=2, description="M, epochs of an expert to catch up with")
    min_start_epoch: Annotated[int, Field(ge=0)] = 0
    max_start_epoch: Count | None = Field(
        default=None,
        description="students start at epochs before this one; default 20, less where `experts` "
        "have fewer epochs",
    )
    batch_size: Count | None = Field(default=None, description="of a student's step; default all")
    image_rate: _Positive = Field(default=100.0, description="step size of the images")
    step_size_rate: Annotated[float, Field(ge=0)] = Field(
        default=1e-5, description="step size of the learned learning rate"
    )
    learning_rate: _Positive = Field(
        default=0.01, description="the student's at first; it is learned with the images"
    )
    student_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_loss: _Positive | None = Field(
        default=None, description="an iteration of greater or no finite loss is skipped"
    )
    start_from: Literal["random_real", "representative", "right"] = Field(
        default="random_real",
        description="real images: random, of clusters, or such that an expert gets right",
    )
    soft_labels: bool = Field(default=False, description="labels are learned as well (DATM)")
    label_rate: _Positive = Field(default=2.0, description="step size of soft labels")
    evaluate_every: Count | None = Field(
        default=None,
        description="iterations between the sets that are compared on the validation part; "
        "default a tenth of all",
    )
    stored_as: Literal["uint8", "float32"] = Field(
        default="uint8",
        description="uint8: 256 levels between the images' own least and greatest value",
    )

    @property
    def interval(self) -> int:
        """Iterations between two evaluations."""
        return self.evaluate_every or max(1, self.num_iterations // 10)

    def window_end(self, num_epochs: int) -> int:
        """The first start epoch that is too late."""
        last = max(1, num_epochs - self.expert_epochs + 1)
        return self.max_start_epoch or min(20, last)


class Mtt(TrajectoryMethod):
    """Matching training trajectories (Cazenavette et al. 2022), with the exact gradient."""

    name: Literal["mtt"]


class Tesla(TrajectoryMethod):
    """MTT with TESLA's gradient (Cui et al. 2023), which leaves out second-order terms."""

    name: Literal["tesla"]
    num_steps: Count = 50


class Ftd(TrajectoryMethod):
    """MTT on flat experts, with a running average of the images (Du et al. 2023)."""

    name: Literal["ftd"]
    image_average: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.999, description="decay of the average of the images, which is what is kept"
    )


class Datm(TrajectoryMethod):
    """Difficulty by window, and learned soft labels (Guo et al. 2024)."""

    name: Literal["datm"]
    num_steps: Count = 80
    num_iterations: Count = 10_000
    start_from: Literal["random_real", "representative", "right"] = "right"
    soft_labels: bool = True
    max_loss: _Positive | None = 1.0
    first_max_start_epoch: Count | None = Field(
        default=None, description="the window's end at first; default half of the final one"
    )
    growth_iterations: Count | None = Field(
        default=None, description="until the window's end is reached; default a third of all"
    )


class Ast(TrajectoryMethod):
    """Smooth experts and five changes to the student (Shen et al. 2023)."""

    name: Literal["ast"]
    image_rate: _Positive = 1_000.0
    student_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    start_from: Literal["random_real", "representative", "right"] = "representative"
    intermediate: bool = Field(default=True, description="match the epochs in between as well")
    graded: bool = Field(default=True, description="weigh the match of epoch i of M by i / M")
    balanced: bool = Field(default=True, description="the student's loss grows with the epoch")
    perturbed: bool = Field(default=True, description="the student starts a little beside")


class DecoupledMethod(ImagesPerClass):
    """Images made under trained teachers, without any training in the loop."""

    label_epochs: Count | None = Field(
        default=None,
        description="labels of views: epochs that are stored and then repeat; default every one",
    )


class Sre2l(DecoupledMethod, RecoverSettings):
    """Images recovered from a teacher's batch statistics (Yin et al. 2023)."""

    name: Literal["sre2l"]
    labels: Literal["classes", "static", "views"] = Field(
        default="static", description="static: the teachers' logits, one vector an image"
    )


class Infer(DecoupledMethod, CompensatorSettings):
    """One compensator for all classes on top of real images (Zhang et al. 2024)."""

    name: Literal["infer"]
    labels: Literal["classes", "static", "views"] = "static"


class Rded(DecoupledMethod, PatchSettings):
    """The most telling patches of real images (Sun et al. 2024)."""

    name: Literal["rded"]
    labels: Literal["classes", "static", "views"] = "static"


class NrrDd(DecoupledMethod, CriticalPatchSettings, RefineSettings, DistanceSettings):
    """Critical regions kept, the rest refined; two distances a view (Tran et al. 2025)."""

    name: Literal["nrr_dd"]
    labels: LabelKind = Field(default="distances", description="DBR: two numbers a view")
    least_sure: bool = Field(
        default=True, description="start from the patches a teacher is least sure of; else the most"
    )

    @property
    def distances(self) -> DistanceSettings:
        """Its settings of a student's training alone."""
        return DistanceSettings.model_validate(
            self.model_dump(include={*DistanceSettings.model_fields})
        )


Trajectory: TypeAlias = Mtt | Tesla | Ftd | Datm | Ast
Decoupled: TypeAlias = Sre2l | Infer | Rded | NrrDd
Method: TypeAlias = Annotated[Trajectory | Decoupled, Field(discriminator="name")]


class Smoothing(Settings):
    """What holds an expert back so that a short student can follow."""

    kind: Literal["auto", "plain", "smooth", "flat"] = Field(
        default="auto",
        description="smooth: AST's loss ramp, gradient penalty and momentum; flat: FTD's steps; "
        "auto: the method's own",
    )
    ramp_epochs: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="AST's clipping loss, which rises over these; smooth 10, else 0"
    )
    penalty_weight: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of AST's gradient penalty; smooth 2, else 0"
    )
    rho: _Positive | None = Field(default=None, description="radius of flat steps; default 0.01")
    alpha: Annotated[float, Field(ge=0)] = Field(default=0.4, description="of flat steps")


class ExpertSettings(Settings):
    """The networks whose trajectories are matched; what is not given is by `smoothing.kind`."""

    count: Count = Field(default=100, description="experts, each with its own seed")
    epochs: Count = 50
    batch_size: Count = 256
    learning_rate: _Positive | None = Field(default=None, description="plain 0.01, smooth 0.003")
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="plain 0, smooth 0.9"
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="plain 0, smooth 0.001"
    )
    drop_epoch: Count | None = Field(
        default=None, description="the rate is lowered from here; plain never, smooth after half"
    )
    drop_factor: _Positive | None = Field(
        default=None, description="times the rate from there; plain 0.1, smooth 0.6"
    )
    smoothing: Smoothing = Smoothing()
    keep: Literal["window", "all"] = Field(
        default="window", description="epochs that are stored: those that this method reads, or all"
    )
    stored_as: Literal["float32", "bfloat16"] = "float32"
    path: list[str] | None = Field(
        default=None, description="trajectories made before, URIs of their artifacts"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _given_or_trained(self) -> "ExpertSettings":
        if self.path is not None and not self.path:
            raise ValueError("`path` names no trajectory")
        return self
