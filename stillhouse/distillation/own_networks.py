"""The code of networks that a spec names as `factory`: it names results, and `submit` sends it."""

from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import SpecError
from stillhouse.own_code import OURS, find_module, is_installed, top_names, top_of
from stillhouse.selection.own import OwnCode


def own_networks(spec: DistillSpec) -> list[OwnCode]:
    """Of each factory in a folder of the user's; installed packages are known by name alone.

    Raises:
        SpecError: it is not here, is too much, or has no such name.
    """
    return [
        _code(name)
        for name in spec.factories
        if top_of(name) not in OURS and not is_installed(name)
    ]


def _code(name: str) -> OwnCode:
    place, wanted = f"factory: {name}", name.partition(":")[2]
    found = find_module(place, name)
    if not {wanted, "*"} & top_names(found.tree):
        raise SpecError(f"`{place}`: no `{wanted}` in {found.module}")
    return OwnCode(name, found.files)
