"""The spec of `job: train` with `task: classify`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from stillhouse.classification.data import ClassifierData
from stillhouse.classification.unlabelled import UnlabelledImages
from stillhouse.models.network_settings import IMAGE_NETWORKS, GivenClassifier, NetworkSettings
from stillhouse.settings import Settings
from stillhouse.spec import Count, JobSpec
from stillhouse.training.data_spec import Weight
from stillhouse.training.named_objective import NamedObjective
from stillhouse.training.spec import StreamedTraining

_HERE = "stillhouse.training.objectives"
CLASSIFIER_OBJECTIVES = {
    "cross_entropy": f"{_HERE}.classify:Classify",
    "kd": f"{_HERE}.kd:Kd",
    "dhkd": f"{_HERE}.dhkd:Dhkd",
    "weak_to_strong": f"{_HERE}.weak_to_strong:WeakToStrong",
    "bags": f"{_HERE}.aggregate:Bags",
    "lsskd": f"{_HERE}.lsskd:Lsskd",
    "hybrid": f"{_HERE}.hybrid:Hybrid",
    "masked": f"{_HERE}.masked:Masked",
    "robust": f"{_HERE}.robust:Robust",
    "self_past": f"{_HERE}.small_losses:SelfPast",
    "co_teaching": f"{_HERE}.small_losses:CoTeaching",
}
"""The classes of built-in objectives for images, by short name."""
NEED_TEACHERS = {"kd": 1, "dhkd": 1, "weak_to_strong": 1, "hybrid": 2}
"""Objectives with teachers, and how many."""
LIVE_OBJECTIVES = ("hybrid",)
"""Objectives that need more of their teachers than logits: these are in the workers."""
OF_IMAGES = ("lsskd", "hybrid", "masked", "robust")
"""Objectives that read nothing but images; robust also vectors."""
BATCH, RATE = 128, 1e-3
"""Images a step and learning rate where the spec has `auto`."""


class ClassifierTeacher(GivenClassifier):
    """A classifier to learn from; it knows all classes of the data, by name."""

    weight: Weight = Field(default=1.0, description="relative to the other teachers'")


class ClassifierObjective(NamedObjective, Settings):
    """What the training of a classifier minimises; all other keys are settings of the class."""

    BUILT_IN: ClassVar[Mapping[str, str]] = CLASSIFIER_OBJECTIVES

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="cross_entropy",
        description=f"one of {', '.join(CLASSIFIER_OBJECTIVES)}; or your own class: "
        "`package.module:Class`",
    )
    teachers: list[ClassifierTeacher] = Field(
        default=[], description="classifiers that the objective learns from"
    )
    signals: Literal["stored", "live"] = Field(
        default="stored",
        description="stored: the teachers' logits of all training images are made once; live: "
        "teachers answer inside the workers, to the images as augmented",
    )

    @property
    def bag_size(self) -> int:
        """Rows that are known together only, and stay together."""
        return int(self.options.get("bag_size", 1))

    def identity(self) -> dict[str, Any]:
        """Name and options; with teachers, their weights and where they answer."""
        named = {"name": self.name, **self.options}
        if not self.teachers:
            return named
        return named | {"weights": [t.weight for t in self.teachers], "signals": self.signals}

    @model_validator(mode="after")
    def _known(self) -> "ClassifierObjective":
        self.check_name()
        if ":" in self.name:
            return self
        needed, given = NEED_TEACHERS.get(self.name, 0), len(self.teachers)
        if bool(needed) != bool(given) or (needed == 2 and given != 2):
            many = {0: "no teachers", 1: "at least one: [{from: ...}]", 2: "two"}[needed]
            raise ValueError(f"`objective.teachers`: {self.name} has {many}")
        size = self.options.get("bag_size", 1)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`objective.bag_size: {size}` is no number of rows")
        return self


class ClassifierTraining(StreamedTraining):
    """How a classifier is trained: as language models are, an image for a sequence."""

    objective: ClassifierObjective = Field(
        default=ClassifierObjective(), description="what is minimised"
    )
    num_epochs: Annotated[float, Field(gt=0)] = Field(
        default=10, description="passes over the training images"
    )
    augmentation: list[Literal["flip", "crop"]] = Field(
        default=[],
        description="flip: left and right; crop: moved by up to an eighth of the side; drawn by "
        "seed, step and row",
    )
    views: Count | None = Field(
        default=None,
        description="`augmentation` draws so many views of each image once, and each step shows "
        "one: stored signals of teachers are made of all; default a new view in every step",
    )

    def identity(self) -> dict[str, Any]:
        """What decides the weights."""
        kept = {*type(self).model_fields} - {"objective", "checkpoint_every", "keep_last"}
        kept -= {"views"} if self.views is None else set()
        objective = self.objective.identity()
        return self.model_dump(mode="json", include=kept) | {"objective": objective}

    def check_batch(self, num_workers: int) -> None:
        """Check that batches can be shared out to the workers in whole bags.

        Raises:
            ValueError: they cannot.
        """
        size, batch = self.objective.bag_size, self.global_batch
        if batch == "auto":
            batch = BATCH // size * size or size
        if batch % size:
            raise ValueError(
                f"`train.objective.bag_size: {size}` does not divide `train.global_batch: {batch}`"
            )
        lanes = self.lanes or batch // size
        if batch // size % lanes:
            raise ValueError(
                f"`train.lanes` {lanes} does not divide `train.global_batch` {batch}"
                + (f" ({batch // size} bags)" if size > 1 else "")
            )
        if lanes % num_workers:
            fits = [n for n in range(1, lanes + 1) if lanes % n == 0]
            raise ValueError(
                f"`compute.trainers` {num_workers} does not divide `train.global_batch` {batch} "
                f"(`train.lanes` {self.lanes or 'by default'}): use one of {fits}"
            )

    @model_validator(mode="after")
    def _of_images(self) -> "ClassifierTraining":
        for key in ("z_loss", "compile"):
            if key in self.model_fields_set and getattr(self, key) not in (0, "off", "auto"):
                raise ValueError(f"`train.{key}` is of language models: leave it out")
        objective = self.objective
        stored = bool(objective.teachers) and objective.signals == "stored"
        stored = stored and objective.name not in LIVE_OBJECTIVES
        if stored and self.augmentation and self.views is None:
            raise ValueError(
                "`train.augmentation` shows other images than teachers have answered to: set "
                "`train.objective.signals: live`, or a number of `train.views`"
            )
        if self.views is not None and not self.augmentation:
            raise ValueError("`train.views` are drawn by `train.augmentation`: leave them out")
        return self


class InitClassifier(GivenClassifier):
    """The classifier that a training starts from."""

    head: Literal["keep", "fresh"] = Field(
        default="keep",
        description="fresh: a new classifier layer, for other classes; it reads `classifier`",
    )
    frozen: bool = Field(default=False, description="only the classifier layer is trained")


class ClassifySpec(JobSpec):
    """`job: train` with `task: classify`: train a classifier of images, vectors or texts."""

    job: Literal["train"]
    task: Literal["classify"]
    data: ClassifierData
    unlabelled: UnlabelledImages | None = Field(
        default=None, description="images without labels, for `train.objective: robust`"
    )
    network: NetworkSettings = NetworkSettings()
    init: InitClassifier | None = Field(
        default=None, description="start from this classifier instead of a fresh `network`"
    )
    train: ClassifierTraining = ClassifierTraining()

    @property
    def num_actors(self) -> int:
        return self.compute.trainers

    @property
    def own_names(self) -> list[str]:
        """The user's networks, each once, as `package.module:name`."""
        given = [*self.train.objective.teachers, *([self.init] if self.init else [])]
        networks = [self.network, *(one.network for one in given if one.network)]
        return sorted({one.factory for one in networks if one.factory})

    @model_validator(mode="after")
    def _fits(self) -> "ClassifySpec":
        if self.init is not None and "network" in self.model_fields_set:
            raise ValueError("give either `network` or `init`: `init` has its own network")
        compute = self.compute
        if compute.min_trainers is not None and compute.min_trainers > compute.trainers:
            raise ValueError(
                f"`compute.min_trainers` {compute.min_trainers} is above `compute.trainers` "
                f"{compute.trainers}"
            )
        if self.init is None and self.network.batch_norm and compute.trainers > 1:
            raise ValueError(
                "`compute.trainers` above 1 splits batches, but `network` takes batch statistics: "
                "set one trainer, or a `norm` other than batch"
            )
        self.train.check_batch(compute.trainers)
        self._check_kind(self.data.kind)
        objective = self.train.objective
        if self.unlabelled is not None and objective.name != "robust" and ":" not in objective.name:
            raise ValueError(f"`unlabelled`: {objective.name} reads labels: use `robust`")
        if self.unlabelled is not None and objective.bag_size > 1:
            raise ValueError("`unlabelled`: bags are of labelled images: leave `bag_size` out")
        return self

    def _check_kind(self, kind: Literal["images", "vectors", "texts"]) -> None:
        """ValueError where the network or the objective reads other samples than these."""
        reads = {"linear": "vectors", "mlp": "vectors", "language_model": "texts"}
        reads |= dict.fromkeys(IMAGE_NETWORKS, "images") | {"factory": "vectors"}
        wanted = reads[self.network.name]
        fits = wanted == kind or (wanted == "vectors" and kind == "images")
        if self.init is None and not fits:
            others = " or ".join(name for name, its in reads.items() if its == kind)
            raise ValueError(f"`network.name: {self.network.name}`: the data are {kind}: {others}")
        if kind == "images":
            return
        name = self.train.objective.name
        if name in OF_IMAGES and not (name == "robust" and kind == "vectors"):
            raise ValueError(f"`train.objective.name: {name}` is of images, the data are {kind}")
        for key, given in (
            ("train.augmentation", self.train.augmentation),
            ("unlabelled", self.unlabelled),
        ):
            if given:
                raise ValueError(f"`{key}` is of images, the data are {kind}: leave it out")
