"""Bounds of an objective's settings."""

from stillhouse.errors import SpecError


def positive(**settings: float) -> None:
    """Refuse settings of an objective that are not above 0.

    Raises:
        SpecError: naming the first one.
    """
    for name, value in settings.items():
        if not value > 0:
            raise SpecError(f"`train.objective.{name}: {value}` has to be above 0")


def not_negative(**settings: float) -> None:
    """Refuse settings of an objective that are below 0.

    Raises:
        SpecError: naming the first one.
    """
    for name, value in settings.items():
        if not value >= 0:
            raise SpecError(f"`train.objective.{name}: {value}` has to be 0 or above")


def proportion(**settings: float) -> None:
    """Refuse settings of an objective that are not between 0 and 1.

    Raises:
        SpecError: naming the first one.
    """
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise SpecError(f"`train.objective.{name}: {value}` is not between 0 and 1")
