"""`job: select` as the verbs see it."""

from dataclasses import dataclass
from typing import Any

from stillhouse.pipelines.context import Context
from stillhouse.pipelines.given import check_given, given_identity, resolved
from stillhouse.pipelines.inputs import JobInputs, Listing, list_job_inputs, open_job_inputs
from stillhouse.selection.carried import check_columns
from stillhouse.spec import SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import FileInfo, absolute_uri
from stillhouse.storage.run_record import RunRecord


def list_select(spec: SelectSpec) -> "ListedSelect":
    """See `stillhouse.jobs.kinds.list_job`."""
    spec = resolved(spec, Store(absolute_uri(spec.store)))
    check_given(spec)
    listing = list_job_inputs(spec)
    if spec.pool.keep_columns:
        check_columns(spec.pool, [file.uri for file in listing.pool])
    return ListedSelect(spec, listing)


@dataclass(frozen=True, slots=True)
class ListedSelect:
    """A select job whose files were listed."""

    spec: SelectSpec
    listing: Listing

    @property
    def files(self) -> list[list[FileInfo]]:
        """Of pool, target and held-out."""
        return [self.listing.pool, self.listing.target, self.listing.heldout]

    def open(self, store: Store, *, remember: bool) -> "OpenedSelect":
        """Digest the files."""
        inputs = open_job_inputs(store, self.spec, self.listing, remember=remember)
        given = given_identity(store, self.spec, remember=remember)
        return OpenedSelect(self.spec, inputs, given)


@dataclass(frozen=True, slots=True)
class OpenedSelect:
    """A select job whose inputs are known by content."""

    spec: SelectSpec
    inputs: JobInputs
    given: list[str | None]
    """Models, tokenizer and threshold that the spec names by path."""

    def identity(self) -> list[Any]:
        """Of the data, and of what is given."""
        return [self.inputs.identity(), self.given]

    def walk(self, ctx: Context) -> object:
        """The whole pipeline."""
        from stillhouse.pipelines.select import run_select

        return run_select(ctx, self.spec, self.inputs)

    def run(self, ctx: Context, record: RunRecord) -> dict[str, Any]:
        """The pipeline, then the report."""
        from stillhouse.pipelines.select import run_select
        from stillhouse.pipelines.select_result import select_result
        from stillhouse.report.page import write

        made = run_select(ctx, self.spec, self.inputs)
        return write(select_result(ctx, self.spec, made, record.uri))

    def estimate(self, ctx: Context, *, complete: bool) -> dict[str, dict[str, Any]]:
        """Behind what was walked, tokens are estimated from bytes."""
        from stillhouse.jobs.select_plan import estimate_steps

        return estimate_steps(self.spec, self.inputs, ctx, complete=complete)
