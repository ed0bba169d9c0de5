"""The policies that a spec may name, one a line."""

from typing import Annotated, TypeAlias

from pydantic import Field

from stillhouse.mixing.doremi import DoReMiSettings
from stillhouse.mixing.exp3 import Exp3Settings
from stillhouse.mixing.loss_scaling import LossScalingSettings
from stillhouse.mixing.odm import OdmSettings
from stillhouse.mixing.replay import ReplaySettings
from stillhouse.mixing.static import StaticSettings
from stillhouse.mixing.ucb1 import Ucb1Settings
from stillhouse.mixing.uniform import TargetOnlySettings, UniformSettings

NamedPolicy: TypeAlias = Annotated[
    Exp3Settings
    | Ucb1Settings
    | OdmSettings
    | DoReMiSettings
    | StaticSettings
    | UniformSettings
    | LossScalingSettings
    | TargetOnlySettings
    | ReplaySettings,
    Field(discriminator="name"),
]
