"""Settings of tokenizers, and whose tokenizer a job has by default."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from stillhouse.settings import Count, Settings

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
    """A spec as written; where it gives models by path, with their tokenizer.

    Args:
        content: the spec, not validated yet.
        keys: of the sections that may give a model by `path` or `from`; the first that does counts.

    Raises:
        ValueError: a tokenizer is to be trained, whose tokens no given model knows.
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
    """Of a section as written or as made."""
    if isinstance(section, dict):
        return cast(dict[str, Any], section).get(key)
    return getattr(section, "from_" if key == "from" else key, None)
