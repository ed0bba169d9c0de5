"""Settings of the samples that a classifier is trained on: images, vectors or texts."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stillhouse.distillation.image_sources import ImageData
from stillhouse.spec import Count

_OF_ROWS = ("where", "choices_column", "length")
_OF_IMAGES = ("dataset", "image_column", "image_size")


class ClassifierData(ImageData):
    """Labelled images, or rows of vectors or texts in Parquet or JSON Lines."""

    feature_column: str | None = Field(
        default=None, description="vectors, lists of numbers of one length, instead of images"
    )
    text_column: str | None = Field(
        default=None, description="texts, instead of images, for `network: language_model`"
    )
    choices_column: str | None = Field(
        default=None,
        description="of few-shot tasks: lists of answers; the class is the place of "
        "`label_column` among them",
    )
    length: Count = Field(
        default=128, description="of texts: tokens that are read; of a longer one the last"
    )
    where: dict[str, str] = Field(
        default={}, description="of vectors and texts: only rows with these values, by column"
    )

    @property
    def kind(self) -> Literal["images", "vectors", "texts"]:
        """What the samples are."""
        if self.feature_column is not None:
            return "vectors"
        return "images" if self.text_column is None else "texts"

    def identity(self) -> dict[str, Any]:
        """Of images the same as for other jobs, which read them from the same artifact."""
        exclude = {"path"}
        if self.kind == "images":
            exclude |= {*type(self).model_fields} - {*ImageData.model_fields}
        return self.model_dump(mode="json", exclude=exclude)

    @model_validator(mode="after")
    def _of_one_kind(self) -> "ClassifierData":
        if self.feature_column is not None and self.text_column is not None:
            raise ValueError("give either `feature_column` or `text_column`")
        given = self.model_fields_set
        unread = _OF_ROWS if self.kind == "images" else _OF_IMAGES
        if self.kind == "vectors":
            unread += ("choices_column", "length")
        for key in unread:
            if key in given:
                raise ValueError(f"`{key}` does nothing for {self.kind}: leave it out")
        return self
