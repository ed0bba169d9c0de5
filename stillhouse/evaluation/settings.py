"""The section `evaluate` of a spec: the tasks that a job's models are measured on."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from stillhouse.data_settings import FileSource
from stillhouse.settings import Count, OneOrMore, Settings
from stillhouse.text.formats import COMPRESSIONS, FORMATS

YAML_SUFFIXES = (".yaml", ".yml")


class TaskFiles(FileSource):
    """A task of your own: rows of `input` and `target`, with `choices` or without, or of `text`; or
    one task file of lm-evaluation-harness (YAML).

    With a column `split`, rows of `test` are measured and the others are examples (`num_fewshot`).
    """

    path: OneOrMore[str] = Field(
        description="files, folders, globs or URIs of task rows; or one YAML file"
    )
    name: str | None = Field(
        default=None, description="of rows; default the first file's or folder's"
    )
    where: dict[str, str] = Field(default={}, description="only rows with these values, by column")

    @property
    def is_yaml(self) -> bool:
        return self.paths[0].lower().endswith(YAML_SUFFIXES)

    @model_validator(mode="after")
    def _one_file(self) -> "TaskFiles":
        if self.is_yaml and (len(self.paths) > 1 or self.name or self.where):
            raise ValueError("a task file (YAML) is one `path` alone: it has its own name and rows")
        return self


def _form(task: Any) -> str:
    """Which member of `_Task` is meant: its mistakes alone are shown."""
    return "[name]" if isinstance(task, str) else "[files]"


_Task = Annotated[
    Annotated[TaskFiles, Tag("[files]")] | Annotated[str, Tag("[name]")], Discriminator(_form)
]


class TaskEvaluation(Settings):
    """Tasks that every model of the job is measured on once it is trained."""

    tasks: Annotated[list[_Task], Field(min_length=1)] = Field(
        description="names that lm-evaluation-harness knows, its task files (YAML), or files of "
        "rows: a path, or {path, name, where}"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="examples before each row; default the task's own, 0 for rows"
    )
    limit: Count | None = Field(default=None, description="measure the first rows of a task only")
    batch_size: Count = Field(default=16, description="sequences of a forward pass")
    checkpoints: bool = Field(
        default=False, description="of `job: train`: the kept checkpoints too (`train.keep_last`)"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _paths(cls, tasks: Any) -> Any:
        return [_as_files(one) for one in tasks] if isinstance(tasks, list) else tasks


def _as_files(task: Any) -> Any:
    """A path as `{path: ...}`; a name as it is."""
    if not isinstance(task, str):
        return task
    known = [end for form in FORMATS.values() for end in form.suffixes]
    ends = (*YAML_SUFFIXES, *(f"{end}{more}" for end in known for more in ("", *COMPRESSIONS)))
    return {"path": task} if "/" in task or task.lower().endswith(ends) else task
