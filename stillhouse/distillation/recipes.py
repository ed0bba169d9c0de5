"""How networks are trained on small sets of images: settings and the published protocols.

A protocol is a recipe and a temperature of soft labels: `p1` is that of MTT and its successors,
`p2` that of SRe2L and INFER on CIFAR, `p3` RDED's. The papers also choose the best step or epoch
on the test set; here the test set is used once, after the last epoch. Accuracies under different
protocols are not comparable.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stillhouse.spec import Count, Settings

Group = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
DSA_GROUPS: tuple[Group, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""Groups of DSA (`augment.draw_augmentation`)."""
ProtocolName = Literal["p1", "p2", "p3"]


class ViewSettings(Settings):
    """How the images of a batch are augmented."""

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
        return self.model_copy(update={"views": self.views.model_copy(update={"flip": False})})


SQUEEZE = Recipe(
    optimiser="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    epochs=200,
    batch_size=128,
    views=ViewSettings(mix="none"),
)
"""SRe2L's teachers on CIFAR."""
FULL = Recipe(epochs=30, batch_size=128, views=ViewSettings(mix="none", flip=False))
"""Training on all real images."""


def _over(base: Recipe) -> BeforeValidator:
    """Keys that a spec leaves out, those of `views` included, are taken from `base`."""

    def filled(section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        views = section.get("views", {})
        if isinstance(views, dict):
            views = base.views.model_dump() | views
        return base.model_dump() | section | {"views": views}

    return BeforeValidator(filled)


SqueezeRecipe = Annotated[Recipe, _over(SQUEEZE)]
FullRecipe = Annotated[Recipe, _over(FULL)]


@dataclass(frozen=True, slots=True)
class Protocol:
    """A recipe, and the temperature of soft labels."""

    recipe: Recipe
    temperature: float


def published(
    name: ProtocolName,
    *,
    images_per_class: int,
    num_classes: int,
    learning_rate: float | None = None,
    factor: int = 1,
) -> Protocol:
    """A published protocol for a set.

    Args:
        name: of the protocol.
        images_per_class: with `num_classes`, decides p3's batch size.
        num_classes: of the set.
        learning_rate: p1: learned with the set; default 0.01.
        factor: p3: patches along a side of an image.
    """
    if name == "p1":
        recipe = Recipe(
            optimiser="sgd",
            learning_rate=learning_rate or 0.01,
            weight_decay=5e-4,
            epochs=1001,
            batch_size=256,
            schedule="step",
            views=ViewSettings(crop="none", flip=False, mix="none"),
        )
        return Protocol(recipe, 1.0)
    if name == "p2":
        return Protocol(Recipe(epochs=400, batch_size=128), 30.0)
    batch = 10 if images_per_class < 10 else 50 if images_per_class < 50 else 100
    batch *= 2 if num_classes >= 100 else 1
    views = ViewSettings(
        crop="resized", min_scale=1 / factor, mix="cutmix", mix_beta=1.0, patches=factor
    )
    recipe = Recipe(epochs=300, batch_size=batch, schedule="half_cosine", views=views)
    return Protocol(recipe, 20.0)
