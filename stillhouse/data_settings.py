"""Settings of documents and tokenizers."""

import re
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Field, field_validator, model_validator

from stillhouse.custom_code import CLASS_PATTERN, CustomCode, find_class
from stillhouse.settings import Count, OneOrMore, Settings
from stillhouse.text.formats import FORMATS

PartTokens: TypeAlias = Count | Literal["auto"]


class ColumnNames(Settings):
    """Names of columns, or of keys of JSON; `a.b` is the key `b` of the object `a`."""

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
    messages: str | None = Field(
        default=None,
        description="conversations, instead of a text: lists of turns with `role` and `content`; "
        "training and scores count what the assistant says",
    )

    @model_validator(mode="after")
    def _one_form(self) -> "ColumnNames":
        if self.messages is not None and {"text", "prompt"} & self.model_fields_set:
            raise ValueError("give `messages`, or `text` (and `prompt`), not both")
        return self

    @property
    def has_answers(self) -> bool:
        """Whether only a part of each document counts."""
        return self.prompt is not None or self.messages is not None


class FileFormat(Settings):
    """How files are read (inputs.md): as Parquet, JSON (a value a line, one array, or indented),
    Arrow, Lance, WARC, CSV, TSV or plain text, or by a class of the user's.

    All but Parquet and Arrow may be compressed (gz, zst, bz2, xz), and be UTF-8, UTF-16 or UTF-32.
    """

    format: str = Field(
        default="auto",
        description=f"{', '.join(f'`{name}`' for name in FORMATS)}, or your own "
        "`my_pkg.module:MyReader`; auto: by the files' suffixes",
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        if name not in ("auto", *FORMATS) and re.fullmatch(CLASS_PATTERN, name) is None:
            known = ", ".join(["auto", *FORMATS])
            raise ValueError(f"{name!r} is none of {known}, nor `my_pkg.module:MyReader`")
        return name

    @cached_property
    def reader(self) -> str | CustomCode:
        """The name of a built-in format, or the code of the user's reader.

        Raises:
            SpecError: no such class, or one without `read` (`find_class`).
        """
        return find_class("format", self.format, ("read",)) if ":" in self.format else self.format

    @property
    def reader_digest(self) -> list[str]:
        """What identifies a reader of the user's; empty for built-in formats."""
        return [self.reader.digest] if isinstance(self.reader, CustomCode) else []


class FileSource(FileFormat):
    """Files, some of whose rows may be bad."""

    path: OneOrMore[str] = Field(
        description="a file, folder, glob or fsspec URI, `hub://NAME`, or several (inputs.md)"
    )
    max_bad_rows: Annotated[float, Field(ge=0)] = Field(
        default=0.01,
        description="bad rows allowed: a share below 1, a count from 1; more stops the run",
    )

    @field_validator("path")
    @classmethod
    def _not_empty(cls, path: str | list[str]) -> str | list[str]:
        if not path or (isinstance(path, list) and not all(path)):
            raise ValueError("give at least one file, folder, glob or URI")
        return path

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class DataSource(FileSource):
    """Documents in files."""

    columns: ColumnNames = ColumnNames()
    source: str | None = Field(default=None, description="one label for all rows that have none")
    max_chars: Count = Field(default=10_000_000, description="a longer text is a bad row")
    skip_bad_files: bool = Field(
        default=False, description="quarantine unreadable files, do not stop"
    )

    def identity(self) -> dict[str, Any]:
        """The settings that change which documents come out of the same bytes."""
        read = {"format", "columns", "source", "max_chars", "skip_bad_files"}
        made = self.model_dump(include=read)
        for form in ("prompt", "messages"):
            if made["columns"][form] is None:
                del made["columns"][form]
        return made | ({"reader": self.reader_digest} if self.reader_digest else {})


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


PathOrSource: TypeAlias = Annotated[DataSource, BeforeValidator(_as_source, DataSource | str)]
"""Documents in files, given by their section or by a path alone."""


class PoolSource(DataSource):
    """The documents to select from, and the columns that kept rows carry along."""

    path: OneOrMore[str] = Field(
        default=[],
        description="a file, folder, glob or fsspec URI, `hub://NAME`, or several (inputs.md)",
    )
    from_: str | None = Field(
        default=None,
        alias="from",
        description="or a run (URI or id) of `job: generate`, STORE#NAME",
    )
    keep_columns: list[str] = Field(
        default=[], description="columns that the kept rows carry, as text; `a.b` as in `columns`"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "PoolSource":
        if bool(self.path) == (self.from_ is not None):
            raise ValueError("give either `path` or `from`")
        return self


class TargetSource(DataSource):
    """The target domain, with the held-out part that is only measured on."""

    heldout: Annotated[float, Field(gt=0.0, lt=1.0)] | DataSource = Field(
        default=0.1,
        description="share of documents held out by groups of duplicates, or files of their own",
    )


class WeightedTarget(TargetSource):
    """One of the target domains of a mixture; its name is the default of `source`."""

    weight: Annotated[float, Field(gt=0.0)] = Field(
        description="share of the mixture that the conditional is trained on, in proportion"
    )


class ExcludeSettings(Settings):
    """A take-down: documents of the pool that no new selection holds, nor any copy of their text.
    Lists are text files with a value a line, or files of rows with a column (inputs.md).
    """

    ids: OneOrMore[str] | None = Field(
        default=None, description="files of ids of documents; their column is `id`"
    )
    hashes: OneOrMore[str] | None = Field(
        default=None,
        description="files of hashes of texts (guide.md), 32 hexadecimal digits; column `hash`",
    )
    urls: OneOrMore[str] | None = Field(default=None, description="files of URLs; column `url`")
    url_column: str = Field(default="url", description="the pool's column of URLs")

    @model_validator(mode="after")
    def _some_list(self) -> "ExcludeSettings":
        if not self.lists:
            raise ValueError("name a list: `ids`, `hashes` or `urls`")
        return self

    @property
    def lists(self) -> dict[str, list[str]]:
        """The paths of each kind of list that is given."""
        given = {"ids": self.ids, "hashes": self.hashes, "urls": self.urls}
        return {k: [v] if isinstance(v, str) else v for k, v in given.items() if v is not None}


def reader_code(settings: Settings) -> list[CustomCode]:
    """The code of all readers of the user's that a spec names."""
    found: list[CustomCode] = []
    if isinstance(settings, FileFormat) and isinstance(settings.reader, CustomCode):
        found.append(settings.reader)
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        several = value.values() if isinstance(value, dict) else value
        for section in several if isinstance(value, list | dict) else [value]:
            found += reader_code(section) if isinstance(section, Settings) else []
    return found


BOS_SETTING = (
    "a BOS token stands before every sequence that is scored or trained on (stored tokens do not "
    "change); auto: where the tokenizer's own post-processor or configuration puts one"
)


FROM_SETTING = "instead of `path`: a run (URI or id), STORE#NAME, or an artifact's URI"


class TokenizerTraining(Settings):
    """A byte-level BPE trained on a random part of the pool."""

    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 8192
    num_bytes: Count = Field(
        default=20_000_000, description="text to train on; more changes little"
    )


class TokenizerSettings(Settings):
    """A tokenizer: trained, or loaded from a folder, URI or hub name."""

    train: TokenizerTraining | None = None
    path: str | None = None
    from_: str | None = Field(default=None, alias="from", description=FROM_SETTING)
    eos_token: str | None = Field(
        default=None, description="stands between documents; default: its own"
    )
    bos: Literal["auto"] | bool = Field(default="auto", description=BOS_SETTING)
    pin: Literal["first", "refresh"] = Field(
        default="first", description="first: a trained one is kept when shards are added"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizerSettings":
        if sum(one is not None for one in (self.train, self.path, self.from_)) != 1:
            raise ValueError("give either `train`, `path` or `from`")
        if self.bos is True and self.train is not None:
            raise ValueError("`bos: true` goes with `path`: a trained tokenizer has no BOS")
        return self


def with_own_tokenizer(content: Any, keys: tuple[str, ...]) -> Any:
    """The spec with the tokenizer of the models that it names, unless it names a tokenizer.

    Args:
        content: the spec, not validated yet.
        keys: of the sections that may name a model by `path` or `from`; the first that does counts.

    Raises:
        ValueError: a tokenizer is to be trained, whose tokens the named model does not know.
    """
    if not isinstance(content, dict):
        return content
    spec = cast(dict[str, Any], content)
    given = [
        (key, name, path)
        for key in keys
        for name in ("path", "from")
        if (path := _key_of(spec.get(key), name))
    ]
    asked = spec.get("tokenizer")
    if not given or isinstance(asked, str) or _key_of(asked, "path") or _key_of(asked, "from"):
        return spec
    key, name, path = given[0]
    if _key_of(asked, "train") is not None:
        raise ValueError(
            f"`tokenizer.train` beside `{key}.{name}`: that model knows only the tokens of its own "
            "tokenizer: leave `tokenizer` out to use it, or give a copy by `tokenizer.path`"
        )
    return spec | {"tokenizer": {name: path} | (asked or {})}


def _key_of(section: Any, key: str) -> Any:
    if isinstance(section, dict):
        return cast(dict[str, Any], section).get(key)
    return getattr(section, "from_" if key == "from" else key, None)
