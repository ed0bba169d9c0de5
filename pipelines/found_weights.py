"""The weights of a training's data sets, as a sweep over mixtures found them."""

from stillhouse.errors import ArtifactError
from stillhouse.pipelines.train_data import HELDOUT, artifact_at, keyed_data
from stillhouse.storage.filesystem import absolute_uri
from stillhouse.storage.run_record import read_json
from stillhouse.training.data_spec import FileData, SelectionData, WeightFrom
from stillhouse.training.spec import TrainSpec


def with_found_weights(spec: TrainSpec) -> TrainSpec:
    """The spec with the weights that the run of a sweep over mixtures found, if it names one.

    Raises:
        ArtifactError: no such run, none of such a sweep, or one that had other data sets.
    """
    weight = spec.datasets[0].weight
    if not isinstance(weight, WeightFrom):
        return spec
    place = f"`data.0.weight`: {weight.from_}"
    result = read_json(absolute_uri(weight.from_), "result.json") or {}
    found = result.get("sweep", {}).get("mixture")
    if found is None:
        raise ArtifactError(f"{place} is no finished run with `sweep.mixture`")
    names = [one["name"] for one in found["data"]]
    here = data_names(spec)
    if names != here:
        raise ArtifactError(f"{place} found weights of {names}, in this order; `data` are {here}")
    data = [
        one.model_copy(update={"weight": entry["weight"]})
        for one, entry in zip(spec.datasets, found["data"], strict=True)
    ]
    return spec.model_copy(update={"data": data})


def data_names(spec: TrainSpec) -> list[str]:
    """What the data sets are called in results, in their order."""
    return [_name(key, one) for key, one in keyed_data(spec).items() if key != HELDOUT]


def _name(key: str, item: SelectionData | FileData) -> str:
    if isinstance(item, SelectionData) or artifact_at(item):
        return "selection"
    return item.label or key
