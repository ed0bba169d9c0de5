"""Settings of a user's own scorer (`stillhouse.selection.own`)."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from stillhouse.custom_code import CLASS_PATTERN
from stillhouse.settings import Count, Settings, refuse_secrets

_OF_THE_IMAGE = {"ray", "torch", "stillhouse", "transformers", "pyarrow", "numpy", "pydantic"}


class OwnScorerSettings(Settings):
    """Your own scorer, a class with three methods, instead of `prior` and `conditional`."""

    import_: str = Field(
        alias="import",
        pattern=CLASS_PATTERN,
        description="`my_pkg.module:MyScorer`: has `fit`, `load` and `score`; sent with the job",
    )
    settings: dict[str, Any] = Field(default={}, description="given to the class as keywords")
    num_tokens: Count = Field(
        default=2_000_000, description="random tokens of the pool that `fit` sees"
    )
    pin: Literal["first", "refresh"] = Field(
        default="first", description="first: what `fit` gave is kept when shards are added"
    )
    pip: list[str] = Field(
        default=[],
        description="requirements that the cluster's image lacks, pinned; for `submit` alone",
    )

    @field_validator("settings")
    @classmethod
    def _no_secrets(cls, settings: dict[str, Any]) -> dict[str, Any]:
        refuse_secrets(settings)
        return settings

    @field_validator("pip")
    @classmethod
    def _requirements(cls, pip: list[str]) -> list[str]:
        for requirement in pip:
            found = re.fullmatch(r"([\w.-]+)(\[[\w,.-]+\])?==[\w.!+]+", requirement)
            if found is None:
                raise ValueError(f"{requirement!r}: write it as NAME==VERSION")
            if re.sub(r"[-_.]+", "-", found[1].lower()) in _OF_THE_IMAGE:
                raise ValueError(f"{requirement!r}: the cluster's image has it: build another one")
        return pip
