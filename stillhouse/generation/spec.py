"""`job: generate`: the settings of a generation, checked before any work.

A way to generate is one file: a settings class whose keys are those of `generation` in a spec, with
the programs that workers run (`stillhouse.generation.method`). A spec names it by a short name of
`GENERATORS` or, if it is the user's own, by `module:Class`; a judge likewise.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from stillhouse.custom_code import import_named
from stillhouse.data_settings import PathOrSource
from stillhouse.generation.judges import Judge
from stillhouse.generation.method import Generation
from stillhouse.generation.model_settings import GeneratorModel
from stillhouse.settings import Count, Settings, Share
from stillhouse.spec import JobSpec, ScoringSettings

_HERE = "stillhouse.generation"
GENERATORS = {
    "codec": f"{_HERE}.methods.codec:Codec",
    "rephrase": f"{_HERE}.methods.rephrase:Rephrase",
    "merge": f"{_HERE}.methods.merge:Merge",
    "prefer": f"{_HERE}.methods.prefer:Prefer",
}
JUDGES = {"pairwise": f"{_HERE}.judges:Pairwise", "likelihood": f"{_HERE}.judges:Likelihood"}


class BudgetSettings(Settings):
    """What the job may ask for in all its runs; once it is spent the job stops, to be resumed."""

    calls: Count | None = None
    tokens: Count | None = Field(default=None, description="prompts and answers together")


def _named(section: Any, table: dict[str, str], base: type[Any], default: str) -> Any:
    if isinstance(section, base):
        return section
    if not isinstance(section, dict):
        return section
    section = {"name": default} | section
    if not isinstance(section["name"], str):
        raise ValueError("`name` is a text")
    found = import_named(section["name"], table)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"`{section['name']}` is no {base.__name__}")
    return found.model_validate(section)


def find_generator(section: Any) -> Any:
    """The section `generation`, validated by the class that its `name` names.

    Raises:
        ValueError: no such class. ValidationError: a key is missing, unknown or wrong.
    """
    return _named(section, GENERATORS, Generation, "codec")


def find_judge(section: Any) -> Any:
    """The section `judge`, likewise."""
    return _named(section, JUDGES, Judge, "pairwise")


class GenerateSpec(JobSpec):
    """`job: generate`: instruction data for a target are written and filtered by models."""

    places: ClassVar[frozenset[str]] = frozenset(("budget",))

    job: Literal["generate"]
    seeds: PathOrSource = Field(
        description="instructions of the target's distribution: rows with `instruction` (and "
        "`response`), other pairs, or `messages`"
    )
    strong: GeneratorModel = Field(description="writes, and answers")
    student: GeneratorModel | None = Field(default=None, description="the model the data are for")
    judge: SerializeAsAny[Annotated[Judge, BeforeValidator(find_judge)]] = Field(
        default_factory=lambda: find_judge({}),
        description=f"its `name` is one of {', '.join(JUDGES)}, or your own",
    )
    generation: SerializeAsAny[Annotated[Generation, BeforeValidator(find_generator)]] = Field(
        description=f"its `name` is one of {', '.join(GENERATORS)}, or your own"
    )
    decontaminate: list[PathOrSource] = Field(
        default=[],
        description="held-out text: nothing is kept that shares word 13-grams with it",
    )
    near: Annotated[Share, Field(gt=0)] = Field(
        default=0.7,
        description="similarity (Jaccard, of character 5-grams) to a seed, or to another one, from "
        "which on an instruction is dropped; 1 for equal sets alone",
    )
    languages: Literal["seeds", "any"] | list[Annotated[str, Field(pattern="^[a-z]{2}$")]] = Field(
        default="seeds",
        description="of what is kept: those of the seeds, or ISO 639-1 codes such as `en`",
    )
    scoring: ScoringSettings = Field(
        default=ScoringSettings(), description="how models given by `path` compute"
    )
    budget: BudgetSettings = BudgetSettings()

    @model_validator(mode="after")
    def _check_roles(self) -> "GenerateSpec":
        needed = self.generation.roles
        if "student" in needed and self.student is None:
            raise ValueError(f"`generation: {self.generation.name}` compares with a `student`")
        if "student" not in needed and self.student is not None:
            raise ValueError(
                f"`generation: {self.generation.name}` asks no `student`: leave it out"
            )
        endpoints = [one.endpoint for one in self.models.values() if one.endpoint is not None]
        places: dict[str, str] = {}
        for one in endpoints:
            if places.setdefault(f"{one.identity}", one.url) != one.url:
                raise ValueError(
                    f"two endpoints serve a model of one name, {one.model!r}: where they are two "
                    "models, give one a `version`; where they are one, give both one `url`"
                )
        if "judge" in needed and self.judge.scores and self.models["judge"].endpoint is not None:
            raise ValueError(
                f"`judge: {self.judge.name}` needs losses of single tokens, which endpoints do not "
                "give: set `judge.model` to one by `path`"
            )
        return self

    @property
    def models(self) -> dict[str, GeneratorModel]:
        """The models that are asked, by role."""
        given = {
            "strong": self.strong,
            "student": self.student,
            "judge": self.judge.model or self.strong,
        }
        return {
            role: model
            for role, model in given.items()
            if role in self.generation.roles and model is not None
        }

    @property
    def num_actors(self) -> int:
        return self.compute.generators

    @property
    def extra_modules(self) -> tuple[str, ...]:
        endpoints = any(one.endpoint is not None for one in self.models.values())
        return (
            *(["openai"] if endpoints else []),
            *([] if self.languages == "any" else ["py3langid"]),
        )
