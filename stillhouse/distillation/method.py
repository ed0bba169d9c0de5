"""What a method of distillation is, and where each one lies.

A method is one file: a settings class whose keys are those of `method` in a spec, and whose
functions the workers call. It is a `TrajectoryMethod` (`stillhouse.distillation.matching`), which
follows experts, or a `DecoupledMethod` (`stillhouse.distillation.decoupled`), which asks teachers.
A spec names it by a short name of `METHODS`, or, if it is the user's own, by `module:Class`.
"""

from typing import Any, ClassVar

from pydantic import Field

from stillhouse.distillation.recipes import ProtocolName
from stillhouse.own_code import import_named
from stillhouse.spec import Count, Settings

_HERE = "stillhouse.distillation.methods"
METHODS = {
    "mtt": f"{_HERE}.mtt:Mtt",
    "tesla": f"{_HERE}.mtt:Tesla",
    "ftd": f"{_HERE}.ftd:Ftd",
    "datm": f"{_HERE}.datm:Datm",
    "ast": f"{_HERE}.ast:Ast",
    "sre2l": f"{_HERE}.sre2l:Sre2l",
    "infer": f"{_HERE}.infer:Infer",
    "rded": f"{_HERE}.rded:Rded",
    "nrr_dd": f"{_HERE}.nrr_dd:NrrDd",
}


class Method(Settings):
    """What every method is asked for."""

    matching: ClassVar[bool]
    """Whether it follows `experts`; else it asks `teachers`."""
    protocol: ClassVar[ProtocolName] = "p3"
    """How networks are trained on its sets."""
    stages: ClassVar[tuple[str, ...]] = ("distil",)
    """The steps in which it makes them."""

    name: str = Field(description="a short one, or `package.module:Class` of your own")
    images_per_class: Count = Field(description="the budget, in real images of each class")
    seed: int = Field(default=0, description="of start images, draws and noise")

    @property
    def patches_per_side(self) -> int:
        """How many patches stand side by side in an image."""
        return 1

    @property
    def label_kind(self) -> str:
        """What its sets are labelled with."""
        return "classes"

    def check_spec(self, spec: Any) -> None:
        """Refuse a `DistillSpec` that it cannot do.

        Raises:
            SpecError: naming the keys to change.
        """


def find_method(given: Any) -> Any:
    """The section `method` of a spec as the settings of the class that its `name` names.

    Raises:
        ValueError: no such method. MissingExtraError: it needs PyTorch, which is not installed.
        ValidationError: a key is missing, unknown or wrong.
    """
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return given
    name: str = given["name"]
    found = import_named(name, METHODS)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"`{name}` is no TrajectoryMethod or DecoupledMethod")
    return found.model_validate(given)
