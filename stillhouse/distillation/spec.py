"""`job: distill`: the settings of a dataset distillation, checked before any work.

A method is one file: a settings class whose keys are those of `method` in a spec, with the
functions that workers call. It is a `TrajectoryMethod` (`stillhouse.distillation.matching`), which
follows experts, or a `DecoupledMethod` (`stillhouse.distillation.decoupled`), which uses teachers.
A spec names it by a short name of `METHODS` or, if it is the user's own, by `module:Class`.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    model_validator,
)

from stillhouse.custom_code import import_named
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.recipes import (
    DSA_GROUPS,
    FULL,
    SQUEEZE,
    FullRecipe,
    Group,
    Protocol,
    ProtocolName,
    Recipe,
    SqueezeRecipe,
    published,
)
from stillhouse.errors import SpecError
from stillhouse.models.network_settings import GivenClassifier, NetworkSettings
from stillhouse.spec import Count, JobSpec, Settings

_HERE = "stillhouse.distillation.methods"
METHODS = {
    "mtt": f"{_HERE}.mtt:Mtt",
    "tesla": f"{_HERE}.mtt:Tesla",
    "ftd": f"{_HERE}.ftd:Ftd",
    "datm": f"{_HERE}.datm:Datm",
    "ast": f"{_HERE}.ast:Ast",
    "sre2l": f"{_HERE}.sre2l:Sre2l",
    "infer": f"{_HERE}.infer:Infer",
    "rded": f"{_HERE}.rded:Rded",
    "nrr_dd": f"{_HERE}.nrr_dd:NrrDd",
}

_Positive = Annotated[float, Field(gt=0)]
_Decay = Annotated[float, Field(ge=0)]


def _form(value: Any) -> str:
    given = isinstance(value, GivenClassifier)
    given = given or (isinstance(value, dict) and bool({"path", "from"} & {*value}))
    return "[given]" if given else "[trained]"


TeacherSettings: TypeAlias = Annotated[
    Annotated[GivenClassifier, Tag("[given]")] | Annotated[NetworkSettings, Tag("[trained]")],
    Discriminator(_form),
]


class Preprocessing(Settings):
    """What is done to pixels; the same for experts, students and evaluation."""

    zca: bool = Field(default=False, description="whiten; else mean and deviation a channel")
    augmentation: list[Group] = Field(
        default=list(DSA_GROUPS),
        description="DSA of trajectory matching, one drawn a batch; [] for none. Leave out `flip` "
        "for digits and letters: other networks, too, then see no flips",
    )


class Smoothing(Settings):
    """What smooths an expert's trajectory, so that a short student can follow it."""

    kind: Literal["auto", "plain", "smooth", "flat"] = Field(
        default="auto",
        description="smooth: AST's loss ramp, gradient penalty and momentum; flat: FTD's steps; "
        "auto: the method's own",
    )
    ramp_epochs: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="AST's clipping loss, which rises over these; smooth 10, else 0"
    )
    penalty_weight: _Decay | None = Field(
        default=None, description="of AST's gradient penalty; smooth 2, else 0"
    )
    rho: _Positive | None = Field(default=None, description="radius of flat steps; default 0.01")
    alpha: _Decay = Field(default=0.4, description="of flat steps")


class ExpertSettings(Settings):
    """The networks whose trajectories are matched; `smoothing.kind` decides the defaults."""

    count: Count = Field(default=100, description="experts, each with its own seed")
    epochs: Count = 50
    batch_size: Count = 256
    learning_rate: _Positive | None = Field(default=None, description="plain 0.01, smooth 0.003")
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="plain 0, smooth 0.9"
    )
    weight_decay: _Decay | None = Field(default=None, description="plain 0, smooth 0.001")
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
        default=None,
        min_length=1,
        description="trajectories made before, URIs of their artifacts",
    )
    seed: int = 0


class EvaluateSettings(Settings):
    """Evaluation of the set: fresh networks are trained on it and tested once."""

    networks: list[NetworkSettings] = Field(
        default=[], description="several give the cross-architecture table; default `network`"
    )
    seeds: Count = Field(default=3, description="fresh networks of each architecture")
    protocol: Literal["own", "p1", "p2", "p3"] = Field(
        default="own",
        description="how networks are trained on the set: p1 as MTT's authors do, p2 SRe2L's and "
        "INFER's, p3 RDED's; own: the method's family's",
    )
    epochs: Count | None = Field(default=None, description="of training on a set; p1 1001, ...")
    batch_size: Count | None = Field(default=None, description="default the protocol's")
    choose_seeds: Count = Field(
        default=3, description="networks that compare the sets of one run on the validation part"
    )
    full: FullRecipe = Field(
        default=FULL,
        description="how the control `full` is trained on all real images; where not given adamw, "
        "30 epochs, batches of 128, no flip, no mix",
    )


class Method(Settings):
    """Settings and behaviour of a distillation method."""

    matching: ClassVar[bool]
    """True: it follows `experts`. False: it uses `teachers`."""
    protocol: ClassVar[ProtocolName] = "p3"
    """How networks are trained on its sets."""
    stages: ClassVar[tuple[str, ...]] = ("distil",)
    """The steps in which it makes images."""

    name: str = Field(description="a short one, or `package.module:Class` of your own")
    images_per_class: Count = Field(description="the budget, in real images of each class")
    seed: int = Field(default=0, description="of start images, draws and noise")

    @property
    def patches_per_side(self) -> int:
        return 1

    @property
    def label_kind(self) -> str:
        return "classes"

    def check_spec(self, spec: Any) -> None:
        """Refuse a `DistillSpec` that the method cannot run.

        Raises:
            SpecError: naming the keys to change.
        """


def find_method(section: Any) -> Any:
    """The spec's section `method`, validated by the class that its `name` names.

    Raises:
        ValueError: no such method. MissingExtraError: PyTorch is not installed.
        ValidationError: a key is missing, unknown or wrong.
    """
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        return section
    method = import_named(section["name"], METHODS)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(f"`{section['name']}` is no TrajectoryMethod or DecoupledMethod")
    return method.model_validate(section)


class DistillSpec(JobSpec):
    """`job: distill`: a small synthetic set is made of a data set of images."""

    job: Literal["distill"]
    data: ImageData
    network: NetworkSettings = NetworkSettings()
    preprocessing: Preprocessing = Preprocessing()
    experts: ExpertSettings | None = Field(
        default=None, description="of trajectory matching (mtt, tesla, ftd, datm, ast)"
    )
    teachers: list[TeacherSettings] | None = Field(
        default=None,
        description="of sre2l, infer, rded, nrr_dd: networks with batch norm to train, or "
        "classifiers that exist",
    )
    squeeze: SqueezeRecipe = Field(
        default=SQUEEZE,
        description="how teachers are trained; where not given as SRe2L's: sgd of rate 0.1 and "
        "decay 5e-4, 200 epochs, batches of 128, no mix",
    )
    method: SerializeAsAny[Annotated[Method, BeforeValidator(find_method)]] = Field(
        description=f"its `name` is one of {', '.join(METHODS)}, or your own"
    )
    evaluate: EvaluateSettings = EvaluateSettings()
    controls: list[Literal["random_real", "herding", "k_centre", "full"]] = Field(
        default=[], description="sets of equal bytes without any synthesis, and the whole data"
    )

    @property
    def num_actors(self) -> int:
        return max(self.compute.experts, self.compute.distillers, self.compute.evaluators)

    @property
    def matching(self) -> bool:
        return self.method.matching

    @property
    def networks(self) -> list[NetworkSettings]:
        """The networks that the set is evaluated on."""
        return self.evaluate.networks or [self.network]

    @property
    def built(self) -> dict[str, NetworkSettings]:
        """Every network that the job builds, by its key in the spec."""
        evaluated = {f"evaluate.networks.{i}": n for i, n in enumerate(self.evaluate.networks)}
        student = {"network": self.network} if self.matching or not evaluated else {}
        return student | evaluated | {f"teachers.{i}": n for i, n in self.trained_teachers.items()}

    @property
    def trained_teachers(self) -> dict[int, NetworkSettings]:
        """The teachers that the job trains, by their number."""
        teachers = enumerate(self.teachers or [])
        return {i: one for i, one in teachers if isinstance(one, NetworkSettings)}

    @property
    def given_teachers(self) -> dict[int, GivenClassifier]:
        """The teachers that exist, by their number."""
        teachers = enumerate(self.teachers or [])
        return {i: one for i, one in teachers if isinstance(one, GivenClassifier)}

    @property
    def own_names(self) -> list[str]:
        """The user's networks and method, each once, as `package.module:name`."""
        named = [self.network, *self.trained_teachers.values(), *self.evaluate.networks]
        named += [one.network for one in self.given_teachers.values() if one.network]
        names = {n.factory for n in named if n.factory} | {self.method.name}
        return sorted(name for name in names if ":" in name)

    @property
    def flips(self) -> bool:
        """Whether a mirrored image is still one of its class."""
        return "flip" in self.preprocessing.augmentation

    @property
    def teacher_recipe(self) -> Recipe:
        return self.squeeze if self.flips else self.squeeze.without_flips()

    @property
    def protocol_name(self) -> ProtocolName:
        named = self.evaluate.protocol
        return self.method.protocol if named == "own" else named

    def protocol(self, num_classes: int, learning_rate: float | None = None) -> Protocol:
        """How networks are trained on a set, with its learned rate where it has one."""
        protocol = published(
            self.protocol_name,
            images_per_class=self.method.images_per_class,
            num_classes=num_classes,
            learning_rate=learning_rate,
            factor=self.method.patches_per_side,
        )
        changes = self.evaluate.model_dump(include={"epochs", "batch_size"}, exclude_none=True)
        recipe = Recipe.model_validate(protocol.recipe.model_dump() | changes)
        return Protocol(recipe if self.flips else recipe.without_flips(), protocol.temperature)

    @property
    def set_augmentation(self) -> tuple[Group, ...]:
        """DSA groups that networks see in training on a set; only p1 uses DSA."""
        return tuple(self.preprocessing.augmentation) if self.protocol_name == "p1" else ()

    @model_validator(mode="after")
    def _reads_images(self) -> "DistillSpec":
        for key, network in self.built.items():
            if network.name == "language_model":
                raise ValueError(f"`{key}`: images are distilled, a language_model reads texts")
        return self

    @model_validator(mode="after")
    def _check_method(self) -> "DistillSpec":
        try:
            (_check_matching if self.matching else _check_decoupled)(self, self.method.name)
            self.method.check_spec(self)
        except SpecError as error:
            raise ValueError(str(error)) from None
        return self


def _check_matching(spec: DistillSpec, name: str) -> None:
    if spec.teachers is not None:
        raise SpecError(f"`method: {name}` matches trajectories: `experts`, no `teachers`")
    if spec.squeeze != SQUEEZE:
        raise SpecError(f"`squeeze` trains `teachers`, `method: {name}` has none: leave it out")
    if spec.network.batch_norm and spec.compute.distillers > 1:
        raise SpecError(
            "`compute.distillers` above 1 splits batches, but `network` takes batch statistics: "
            "set one distiller, or a `norm` other than batch"
        )


def _check_decoupled(spec: DistillSpec, name: str) -> None:
    if spec.experts is not None:
        raise SpecError(f"`method: {name}` learns from `teachers`, not from `experts`")
    if not spec.teachers:
        raise SpecError(f"`method: {name}` needs `teachers`, networks with batch norm")
    if spec.preprocessing.zca:
        raise SpecError(f"`method: {name}` works on plain pixels: `preprocessing.zca` off")
    if spec.squeeze != SQUEEZE and not spec.trained_teachers:
        raise SpecError("`squeeze` trains `teachers`, and all of yours exist: leave it out")
    for i, teacher in enumerate(spec.teachers):
        network = teacher.network if isinstance(teacher, GivenClassifier) else teacher
        if network is not None and network.factory is None and not network.batch_norm:
            raise SpecError(
                f"`teachers.{i}` has no batch statistics to match: give it `norm: batch`"
            )
