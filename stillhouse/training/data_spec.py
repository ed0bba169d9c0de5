"""What a language model is trained on, as in a spec: data sets, and their weights in a mixture."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from stillhouse.data_settings import DataSource
from stillhouse.settings import Settings
from stillhouse.training.schedule import Schedule, Share

Weight = Annotated[float, Field(gt=0)]


class WeightPoint(Settings):
    """A weight, and when it begins."""

    at: Annotated[float, Field(ge=0, le=1)] = Field(description="as a fraction of the training")
    weight: Annotated[float, Field(ge=0)] = Field(description="0: the data set is not drawn")


class WeightSchedule(Settings):
    """A weight that changes during the training."""

    schedule: list[WeightPoint] = Field(
        min_length=1, description="[{at: 0, weight: 3}, {at: 0.8, weight: 0}]: rising from `at: 0`"
    )
    between: Literal["step", "linear"] = Field(
        default="step", description="linear: the weight moves evenly from one point to the next"
    )

    @model_validator(mode="after")
    def _rises(self) -> "WeightSchedule":
        at = [point.at for point in self.schedule]
        if at[0] != 0:
            raise ValueError(f"the first `at` is {at[0]:g}: a schedule begins at 0")
        if any(later <= earlier for earlier, later in pairwise(at)):
            raise ValueError(f"`at` has to rise from point to point, not {at}")
        if not any(point.weight for point in self.schedule):
            raise ValueError("every weight is 0: leave the data set out")
        return self

    @property
    def points(self) -> Schedule:
        found = tuple((point.at, point.weight) for point in self.schedule)
        return Schedule(found, self.between == "linear")


class WeightFrom(Settings):
    """The weight that a sweep over mixtures found for the data set in the same place."""

    from_: str = Field(
        alias="from", description="a step of a chain, or a run, with `sweep.mixture`"
    )


def _weight_form(value: Any) -> str:
    if isinstance(value, WeightFrom) or (isinstance(value, Mapping) and "from" in value):
        return "[from]"
    changes = isinstance(value, Mapping | WeightSchedule)
    return "[schedule]" if changes else "[number]"


AnyWeight: TypeAlias = Annotated[
    Annotated[Weight, Tag("[number]")]
    | Annotated[WeightSchedule, Tag("[schedule]")]
    | Annotated[WeightFrom, Tag("[from]")],
    Discriminator(_weight_form),
]


class _Mixed(Settings):
    """Keys of a data set in a mixture."""

    weight: AnyWeight = Field(
        default=1.0, description="share in a mixture, against the others'; or one that changes"
    )
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="how often its sequences may be seen; default: no limit"
    )
    when_exhausted: Literal["refuse", "reweight"] = Field(
        default="refuse",
        description="reweight: once it was seen `max_epochs` times, the others share its draws",
    )

    @property
    def share(self) -> Share:
        """What it asks for of a training."""
        weight = self.weight.points if isinstance(self.weight, WeightSchedule) else self.weight
        assert not isinstance(weight, WeightFrom), "not found yet: see `with_found_weights`"
        return Share(weight, self.max_epochs, self.when_exhausted == "reweight")

    @model_validator(mode="after")
    def _limited(self) -> "_Mixed":
        if self.when_exhausted == "reweight" and self.max_epochs is None:
            raise ValueError("`when_exhausted: reweight` needs `max_epochs`")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without limits as before there were any: runs are named by what their spec says."""
        content = handler(self)
        if self.max_epochs is None:
            content.pop("max_epochs", None)
            content.pop("when_exhausted", None)
        return content


def _with_old_name(schema: dict[str, Any]) -> None:
    """Add `selection`, which is the same as `from`, to a JSON Schema."""
    schema["properties"]["selection"] = schema["properties"]["from"]
    schema["required"].remove("from")
    schema["oneOf"] = [{"required": ["from"]}, {"required": ["selection"]}]


class SelectionData(_Mixed):
    """Sequences of a selection, or tokens."""

    model_config = ConfigDict(json_schema_extra=_with_old_name)

    from_: str = Field(
        alias="from",
        description="a run (URI or id), STORE#NAME, or an artifact's URI; `selection` is the same",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, content: Any) -> Any:
        if not isinstance(content, dict) or "selection" not in content:
            return content
        if "from" in content:
            raise ValueError("give either `from` or `selection`: they are the same")
        return {"from" if key == "selection" else key: value for key, value in content.items()}


class FileData(DataSource, _Mixed):
    """Parquet files of tokens (a column `input_ids`), a tokens artifact, or documents."""

    @property
    def label(self) -> str:
        """What it is called in results: its source, or by its path; empty for `folder/*`."""
        return self.source or PurePosixPath(self.paths[0].rstrip("/")).stem.strip("*")


def _form(value: Any) -> str:
    has = bool({"selection", "from"} & {*value}) if isinstance(value, dict) else False
    has = has or hasattr(value, "from_")
    return "[selection]" if has else "[files]"


TrainingData: TypeAlias = Annotated[
    Annotated[SelectionData, Tag("[selection]")] | Annotated[FileData, Tag("[files]")],
    Discriminator(_form),
]


def check_mixture(datasets: Sequence[SelectionData | FileData]) -> None:
    """Check the weights of data sets against each other.

    Raises:
        ValueError: a schedule without a mixture, a time at which all weights are 0, or weights that
            are found for some data sets alone.
    """
    places = {one.weight.from_ if isinstance(one.weight, WeightFrom) else "" for one in datasets}
    if places != {""}:
        if len(places) > 1 or len(datasets) == 1:
            raise ValueError(
                "`data`: weights are found for all data sets of a mixture together: give each one "
                f"`weight: {{from: {max(places)}}}`"
            )
        return
    weights = [one.share.weight for one in datasets]
    schedules = [weight for weight in weights if isinstance(weight, Schedule)]
    if schedules and len(datasets) == 1:
        raise ValueError("`data.weight`: one data set has no schedule: it is all there is to draw")
    if len(schedules) < len(weights):
        return
    for at in sorted({at for one in schedules for at, _ in one.points}):
        if not any(one.at(at) for one in schedules):
            raise ValueError(f"`data`: the weights of all data sets are 0 at {at:g}")


def check_heldout(heldout: SelectionData | FileData) -> None:
    """Check that held-out data have no keys of a mixture's.

    Raises:
        ValueError: they have.
    """
    if heldout.max_epochs is not None:
        raise ValueError("`heldout.max_epochs`: held-out data are not trained on: leave it out")
    if "weight" in heldout.model_fields_set:
        raise ValueError("`heldout.weight`: held-out data are not trained on: leave it out")
