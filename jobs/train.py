"""`job: train` as the verbs see it."""

from dataclasses import dataclass
from typing import Any

from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import resolved
from stillhouse.pipelines.train_data import Listing, TrainInputs, list_data, open_data
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo, absolute_uri
from stillhouse.storage.run_record import RunRecord
from stillhouse.training.spec import TrainSpec, check_width


def list_train(spec: TrainSpec) -> "ListedTrain":
    """See `stillhouse.jobs.kinds.list_job`."""
    check_width(spec)
    spec = resolved(spec, Store(absolute_uri(spec.store)))
    return ListedTrain(spec, list_data(spec))


@dataclass(frozen=True, slots=True)
class ListedTrain:
    """A train job whose files were listed."""

    spec: TrainSpec
    listing: Listing

    @property
    def files(self) -> list[list[FileInfo]]:
        """Of each data set, and of the held-out."""
        return list(self.listing.values())

    def open(self, store: Store, *, remember: bool) -> "OpenedTrain":
        """Look at manifests, footers and digests."""
        return OpenedTrain(self.spec, open_data(store, self.spec, self.listing, remember=remember))


@dataclass(frozen=True, slots=True)
class OpenedTrain:
    """A train job whose inputs are known by content."""

    spec: TrainSpec
    inputs: TrainInputs

    def identity(self) -> list[Any]:
        """Of the data and of the tokenizer."""
        return [self.inputs.identity()]

    def walk(self, ctx: Context) -> object:
        """The whole pipeline."""
        from stillhouse.pipelines.train import run_train

        return run_train(ctx, self.spec, self.inputs)

    def run(self, ctx: Context, record: RunRecord) -> dict[str, Any]:
        """The pipeline, then the report."""
        from stillhouse.pipelines.train import run_train
        from stillhouse.pipelines.train_result import train_result
        from stillhouse.report.page import write

        made = run_train(ctx, self.spec, self.inputs)
        return write(train_result(ctx, self.spec, made, record.uri))

    def estimate(self, ctx: Context, *, complete: bool) -> dict[str, dict[str, Any]]:
        """Tokens and FLOPs of the training; seconds as earlier ones of the store took."""
        from stillhouse.jobs.train_plan import estimate_train

        return estimate_train(self.spec, self.inputs, ctx, complete=complete)
