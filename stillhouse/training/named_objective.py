"""An objective as a spec names it: the settings that those of all kinds of models share."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar


class NamedObjective:
    """Beside `Settings` that allow extra keys: these are settings of the objective's class.

    Attributes:
        BUILT_IN: `module:Class` by name.
    """

    BUILT_IN: ClassVar[Mapping[str, str]]

    if TYPE_CHECKING:
        name: str

        @property
        def model_extra(self) -> dict[str, Any] | None: ...

    @property
    def place(self) -> str:
        """`module:Class`."""
        return self.BUILT_IN.get(self.name, self.name)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the class."""
        return self.model_extra or {}

    def check_name(self) -> None:
        """ValueError for a name that is neither built in nor a class."""
        if self.name not in self.BUILT_IN and ":" not in self.name:
            raise ValueError(
                f"`objective.name: {self.name}`: one of {', '.join(self.BUILT_IN)}, or your own "
                "class as `package.module:Class`"
            )
