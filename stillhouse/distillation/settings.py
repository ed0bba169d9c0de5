"""How networks are trained on small sets, and how the decoupled methods make theirs.

Apart from the methods, so that a spec is checked without loading PyTorch.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stillhouse.spec import Count, Settings

Group = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
DSA_GROUPS: tuple[Group, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""Of differentiable Siamese augmentation, one of which is drawn for a batch."""


class ViewSettings(Settings):
    """How the images of a batch are changed, each step of training."""

    crop: Literal["none", "pad", "resized"] = Field(
        default="pad",
        description="pad: moved by up to an eighth of the side; resized: a part, enlarged",
    )
    min_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.08, description="resized: smallest share of the image's area"
    )
    flip: bool = Field(default=True, description="left and right; off for digits and letters")
    mix: Literal["none", "mixup", "cutmix"] = "mixup"
    mix_beta: Annotated[float, Field(gt=0)] = Field(
        default=0.8, description="the image's weight is drawn from Beta(mix_beta, mix_beta)"
    )
    patches: Annotated[int, Field(ge=1)] = Field(
        default=1, description="shuffle patches x patches tiles (RDED's stitched images)"
    )


class Recipe(Settings):
    """How a network is trained on a set of images."""

    optimiser: Literal["sgd", "adamw"] = Field(
        default="adamw", description="adamw: no weight decay on biases and norms"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    epochs: Count = 300
    batch_size: Count = 100
    schedule: Literal["cosine", "half_cosine", "step"] = Field(
        default="cosine",
        description="cosine: to 0; half_cosine: to half the rate; step: a tenth after half-time, "
        "with a fresh optimiser",
    )
    views: ViewSettings = ViewSettings()

    def without_flips(self) -> "Recipe":
        """The same, for images whose mirror image is another thing."""
        return self.model_copy(update={"views": self.views.model_copy(update={"flip": False})})


SQUEEZE = Recipe(
    optimiser="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    epochs=200,
    batch_size=128,
    views=ViewSettings(mix="none"),
)
"""The teachers of SRe2L on CIFAR."""

FULL = Recipe(epochs=30, batch_size=128, views=ViewSettings(mix="none", flip=False))
"""On all real images."""


def _over(base: Recipe) -> BeforeValidator:
    """Keys that are not given, of the views as well, are those of `base`, not of a bare recipe."""

    def filled(given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        views = given.get("views", {})
        if isinstance(views, dict):
            views = base.views.model_dump() | views
        return base.model_dump() | given | {"views": views}

    return BeforeValidator(filled)


SqueezeRecipe = Annotated[Recipe, _over(SQUEEZE)]
FullRecipe = Annotated[Recipe, _over(FULL)]


class MatchingSettings(Settings):
    """How images, or a compensator, are fitted to a teacher: Adam with a cosine to 0."""

    iterations: Count = 1_000
    learning_rate: Annotated[float, Field(gt=0)] = 0.25
    statistics_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="r_bn; the terms grow with the network's depth and width"
    )
    jitter: Annotated[int, Field(ge=0)] = Field(
        default=4, description="images are rolled by 0 to this many pixels in both directions"
    )


class RecoverSettings(MatchingSettings):
    """How SRe2L's images are recovered."""

    batch_size: Count = Field(default=100, description="images whose statistics are taken together")
    min_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="below 1: random crops of at least this share (0.08 for ImageNet)"
    )
    total_variation: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of the smoothness prior"
    )
    l2: Annotated[float, Field(ge=0)] = Field(default=0.0, description="weight of the image norm")


class CompensatorSettings(MatchingSettings):
    """How a compensator is fitted."""

    statistics_weight: float = Field(default=1.0, ge=0, description="r_bn: 1 CIFAR, 0.01 ImageNet")


class PatchSettings(Settings):
    """How patches are cut and chosen."""

    factor: Count = Field(default=1, description="factor x factor patches to an image; 2 from 128")
    num_crops: Count = Field(default=5, description="tried of each real image")
    num_candidates: Count = Field(default=300, description="real images of a class looked at")
    min_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.08, description="smallest share of an image's area that a crop may cover"
    )


class CriticalPatchSettings(PatchSettings):
    """How NRR-DD's initial patches are chosen."""

    num_covering: Count = Field(
        default=2,
        description="crops of an image that cover most of its map; the least sure is kept",
    )


class RefineSettings(Settings):
    """How non-critical regions are refined."""

    iterations: Count = 200
    batch_size: Count = Field(default=100, description="images whose statistics are taken together")
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    statistics_weight: Annotated[float, Field(ge=0)] = Field(default=0.01, description="alpha_bn")
    epsilon: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="where the map is stronger, pixels are critical and never move"
    )


class DistanceSettings(Settings):
    """How a student learns from stored distances (DBR): L_S = L_sce + alpha_dbr * L_dbr."""

    class_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="of L_sce, the cross-entropy with the mixed classes"
    )
    deviation_weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="alpha_dbr")
    deviation: Literal["divergence", "absolute"] = Field(
        default="divergence",
        description="L_dbr. divergence: of the probabilities that two distances pin down (class, "
        "partner's class, all others); absolute: mean difference of the distances",
    )
