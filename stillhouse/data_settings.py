"""The settings of documents: where they are, how they are read and cut."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator

from stillhouse.settings import Count, Settings

PartTokens: TypeAlias = Count | Literal["auto"]


class ColumnNames(Settings):
    """Which columns (Parquet) or keys (JSON) hold what; `a.b` is the key `b` of the object `a`."""

    text: str = Field(default="text", description="the document's text")
    id: str | None = Field(
        default=None, description="its id; default `id` if present, else file and row"
    )
    source: str | None = Field(
        default=None,
        description="its source label; default `source` if present, or a folder `source=LABEL`",
    )
    prompt: str | None = Field(
        default=None,
        description="read before the text, which is an answer to it: training counts the answer",
    )


class DataSource(Settings):
    """Documents in files: Parquet, JSON (a value a line, one array, or indented) or plain text.

    JSON and text may be compressed (gz, zst, bz2, xz) and in UTF-8, UTF-16 or UTF-32.
    """

    path: str | list[str] = Field(description="a file, folder, glob or fsspec URI, or several")
    format: Literal["auto", "parquet", "jsonl", "text"] = Field(
        default="auto", description="auto: by the files' suffixes"
    )
    columns: ColumnNames = ColumnNames()
    source: str | None = Field(default=None, description="one label for all rows that have none")
    max_bad_rows: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="bad rows allowed: a share below 1, a count from 1; more stops the run",
    )
    max_chars: Count = Field(default=10_000_000, description="a longer text is a bad row")
    skip_bad_files: bool = Field(
        default=False, description="quarantine unreadable files, do not stop"
    )

    @field_validator("path")
    @classmethod
    def _not_empty(cls, path: str | list[str]) -> str | list[str]:
        if not path or (isinstance(path, list) and not all(path)):
            raise ValueError("give at least one file, folder, glob or URI")
        return path

    def identity(self) -> dict[str, Any]:
        """The settings that change which documents come out of the same bytes."""
        read = {"format", "columns", "source", "max_chars", "skip_bad_files"}
        made = self.model_dump(include=read)
        if self.columns.prompt is None:
            del made["columns"]["prompt"]
        return made

    @property
    def paths(self) -> list[str]:
        """The paths as a list."""
        return [self.path] if isinstance(self.path, str) else self.path


class PoolSource(DataSource):
    """The documents to choose from, and what of them the kept rows carry along."""

    keep_columns: list[str] = Field(
        default=[], description="columns that the kept rows carry, as text; `a.b` as in `columns`"
    )


class TargetSource(DataSource):
    """The domain to become good at, with the part that is only measured on."""

    heldout: Annotated[float, Field(gt=0.0, lt=1.0)] | DataSource = Field(
        default=0.1,
        description="share of documents held out by groups of duplicates, or files of their own",
    )
