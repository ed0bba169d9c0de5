"""`job: distill`: the settings of a dataset distillation, checked before any work."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.methods import Datm, ExpertSettings, Infer, Method, TrajectoryMethod
from stillhouse.distillation.settings import (
    DSA_GROUPS,
    FULL,
    SQUEEZE,
    FullRecipe,
    Group,
    Recipe,
    SqueezeRecipe,
)
from stillhouse.spec import Count, JobSpec, Settings


class NetworkSettings(Settings):
    """A network for images."""

    name: Literal["convnet", "resnet18", "factory"] = "convnet"
    depth: Count = Field(default=3, description="convnet: blocks, each halves the image")
    width: Count | None = Field(default=None, description="channels; convnet 128, resnet18 64")
    norm: Literal["instance", "batch", "none"] | None = Field(
        default=None, description="convnet instance, resnet18 batch"
    )
    factory: str | None = Field(
        default=None,
        pattern=r"^[\w.]+:\w+$",
        description="`package.module:function`, called with num_channels, image_size, num_classes "
        "and `options`; gives a torch.nn.Module",
    )
    options: dict[str, Any] = Field(default={}, description="keyword arguments of the factory")

    @model_validator(mode="after")
    def _fits(self) -> "NetworkSettings":
        if (self.name == "factory") != (self.factory is not None):
            raise ValueError("`factory` goes with `name: factory`, and only with it")
        unread = {
            "convnet": {"options"},
            "resnet18": {"options", "depth"},
            "factory": {"depth", "width", "norm"},
        }[self.name]
        for key in sorted(unread):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` does nothing for `name: {self.name}`: leave it out")
        return self

    @property
    def batch_norm(self) -> bool:
        """Whether it has batch norm; of a factory nobody knows before it is called."""
        own = "batch" if self.name == "resnet18" else "instance"
        return self.factory is None and (self.norm or own) == "batch"

    @property
    def label(self) -> str:
        """How people call it, `convnet-3, width 32`; different networks have different ones."""
        if self.factory is not None:
            options = [f"{name} {value}" for name, value in sorted(self.options.items())]
            return ", ".join([self.factory, *options])
        base = f"convnet-{self.depth}" if self.name == "convnet" else self.name
        width = f", width {self.width}" if self.width else ""
        norm = {None: "", "none": ", no norm"}.get(self.norm, f", {self.norm} norm")
        return base + width + norm


class Preprocessing(Settings):
    """What networks see of the pixels; the same for experts, students and evaluation."""

    zca: bool = Field(default=False, description="whiten; else mean and deviation a channel")
    augmentation: list[Group] = Field(
        default=list(DSA_GROUPS),
        description="DSA of trajectory matching, one drawn a batch; [] for none. Leave out `flip` "
        "for digits and letters: other networks, too, then see no flips",
    )


class EvaluateSettings(Settings):
    """How good the set is: fresh networks trained on it, tested once on the test part."""

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


class DistillSpec(JobSpec):
    """`job: distill`: a data set of images becomes a small synthetic one."""

    job: Literal["distill"]
    data: ImageData
    network: NetworkSettings = NetworkSettings()
    preprocessing: Preprocessing = Preprocessing()
    experts: ExpertSettings | None = Field(
        default=None, description="of trajectory matching (mtt, tesla, ftd, datm, ast)"
    )
    teachers: list[NetworkSettings] | None = Field(
        default=None, description="of sre2l, infer, rded, nrr_dd: networks with batch norm"
    )
    squeeze: SqueezeRecipe = Field(
        default=SQUEEZE,
        description="how teachers are trained; where not given as SRe2L's: sgd of rate 0.1 and "
        "decay 5e-4, 200 epochs, batches of 128, no mix",
    )
    method: Method
    evaluate: EvaluateSettings = EvaluateSettings()
    controls: list[Literal["random_real", "herding", "k_centre", "full"]] = Field(
        default=[], description="sets of equal bytes without any synthesis, and the whole data"
    )

    @property
    def num_actors(self) -> int:
        """How many may be at work at once."""
        compute = self.compute
        return max(compute.experts, compute.distillers, compute.evaluators)

    @property
    def matching(self) -> bool:
        """Whether the method matches trajectories."""
        return isinstance(self.method, TrajectoryMethod)

    @property
    def networks(self) -> list[NetworkSettings]:
        """What the set is evaluated on."""
        return self.evaluate.networks or [self.network]

    @property
    def built(self) -> dict[str, NetworkSettings]:
        """Every network that the job builds, by its key."""
        evaluated = {f"evaluate.networks.{i}": n for i, n in enumerate(self.evaluate.networks)}
        own = {"network": self.network} if self.matching or not evaluated else {}
        teachers = {f"teachers.{i}": n for i, n in enumerate(self.teachers or [])}
        return own | evaluated | teachers

    @property
    def factories(self) -> list[str]:
        """Of all its networks, each once, as `package.module:function`."""
        named = [self.network, *(self.teachers or []), *self.evaluate.networks]
        return sorted({network.factory for network in named if network.factory is not None})

    @property
    def flips(self) -> bool:
        """Whether a mirrored image is still one of its class."""
        return "flip" in self.preprocessing.augmentation

    @property
    def teacher_recipe(self) -> Recipe:
        """`squeeze`, without flips where there are none."""
        return self.squeeze if self.flips else self.squeeze.without_flips()

    @model_validator(mode="after")
    def _family(self) -> "DistillSpec":
        name = self.method.name
        if self.matching:
            if self.teachers is not None:
                raise ValueError(f"`method: {name}` matches trajectories: `experts`, no `teachers`")
            if self.squeeze != SQUEEZE:
                raise ValueError(
                    f"`squeeze` trains `teachers`, `method: {name}` has none: leave it out"
                )
            if self.network.batch_norm and self.compute.distillers > 1:
                raise ValueError(
                    "`compute.distillers` above 1 splits batches, whose statistics `network` takes "
                    "as a whole: one distiller, or a `norm` other than batch"
                )
            _check_window(self)
        else:
            if self.experts is not None:
                raise ValueError(f"`method: {name}` learns from `teachers`, not from `experts`")
            if not self.teachers:
                raise ValueError(f"`method: {name}` needs `teachers`, networks with batch norm")
            if self.preprocessing.zca:
                raise ValueError(f"`method: {name}` works on plain pixels: `preprocessing.zca` off")
            for i, teacher in enumerate(self.teachers):
                if teacher.factory is None and not teacher.batch_norm:
                    raise ValueError(
                        f"`teachers.{i}` has no batch statistics to match: give it `norm: batch`"
                    )
        if isinstance(self.method, Infer) and self.method.images_per_class < 2:
            raise ValueError(
                "`method.images_per_class: 1` leaves INFER no real image beside its compensators: "
                "at least 2 are needed, more where there are more `teachers` than classes"
            )
        return self


def _check_window(spec: DistillSpec) -> None:
    """The start window lies inside the experts' epochs."""
    experts, method = spec.experts or ExpertSettings(), spec.method
    assert isinstance(method, TrajectoryMethod)
    if experts.path is not None:
        return
    end = method.window_end(experts.epochs)
    first = method.first_max_start_epoch if isinstance(method, Datm) else None
    if first is not None and not method.min_start_epoch < first <= end:
        raise ValueError(
            f"`method.first_max_start_epoch: {first}` has to lie above `min_start_epoch` "
            f"({method.min_start_epoch}) and at most at `max_start_epoch` ({end})"
        )
    if method.min_start_epoch >= end:
        raise ValueError(
            f"no start epoch lies in [{method.min_start_epoch}, {end}): raise "
            "`method.max_start_epoch` or lower `method.min_start_epoch`"
        )
    if end - 1 + method.expert_epochs > experts.epochs:
        raise ValueError(
            f"a start at epoch {end - 1} and {method.expert_epochs} epochs more lead beyond the "
            f"experts' {experts.epochs}: lower `method.max_start_epoch` or raise `experts.epochs`"
        )
