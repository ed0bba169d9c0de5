"""Settings of tokenizers, and whose tokenizer a job has by default."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from stillhouse.settings import Count, Settings

BOS_SETTING = (
    "a BOS token stands before every sequence that is scored or trained on (stored tokens do not "
    "change); auto: where the tokenizer's own post-processor or configuration puts one"
)


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
    eos_token: str | None = Field(
        default=None, description="stands between documents; default: its own"
    )
    bos: Literal["auto"] | bool = Field(default="auto", description=BOS_SETTING)
    pin: Literal["first", "refresh"] = Field(
        default="first", description="first: a trained one is kept when shards are added"
    )

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizerSettings":
        if (self.train is None) == (self.path is None):
            raise ValueError("give either `train` or `path`")
        if self.bos is True and self.path is None:
            raise ValueError("`bos: true` goes with `path`: a trained tokenizer has no BOS")
        return self


def with_own_tokenizer(content: Any, keys: tuple[str, ...]) -> Any:
    """A spec as written; where it gives models by path, with their tokenizer.

    Args:
        content: the spec, not validated yet.
        keys: of the sections that may give a model by `path`; the first that does counts.

    Raises:
        ValueError: a tokenizer is to be trained, whose tokens no given model knows.
    """
    if not isinstance(content, dict):
        return content
    spec = cast(dict[str, Any], content)
    given = [(key, path) for key in keys if (path := _key_of(spec.get(key), "path"))]
    asked = spec.get("tokenizer")
    if not given or isinstance(asked, str) or _key_of(asked, "path"):
        return spec
    key, path = given[0]
    if _key_of(asked, "train") is not None:
        raise ValueError(
            f"`tokenizer.train` beside `{key}.path`: that model knows only the tokens of its own "
            "tokenizer: leave `tokenizer` out to use it, or give a copy by `tokenizer.path`"
        )
    return spec | {"tokenizer": {"path": path} | (asked or {})}


def _key_of(section: Any, key: str) -> Any:
    """Of a section as written or as made."""
    if isinstance(section, dict):
        return cast(dict[str, Any], section).get(key)
    return getattr(section, key, None)
