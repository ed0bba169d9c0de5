"""Runs that differ in nothing but their arms: found by name, then refused or gone on from.

A run's name is half that of its lineage (everything but the arms) and half its own, so those that
one might go on from are found by listing the checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, TypeAlias

from stillhouse.errors import SpecError
from stillhouse.storage.artifact import Store
from stillhouse.training.task import CHECKPOINTS

Arms: TypeAlias = Sequence[tuple[str, str]]
"""Names and parts of arms, in order."""
Rule: TypeAlias = Literal["same", "extend", "fresh"]
_HALF = 32


@dataclass(frozen=True, slots=True)
class Origin:
    """The newest checkpoint of an unfinished run.

    `arms`: names and parts, in order. `tokenizer`: name of its folder.
    """

    name: str
    step: int
    arms: tuple[tuple[str, str], ...]
    tokenizer: str


def run_name(lineage: str, identity: str) -> str:
    """A run's fingerprint, from those of its lineage and of all that decides its model."""
    return lineage[:_HALF] + identity[:_HALF]


def checkpoint_identity(name: str, arms: Arms, tokenizer: str) -> dict[str, Any]:
    """What a checkpoint says of its run: JSON values."""
    return {
        "task": name,
        "arms": [list(arm) for arm in arms],
        "tokenizer": PurePosixPath(tokenizer).name,
    }


def unfinished_runs(store: Store, names: Sequence[str], lineage: str) -> list[Origin]:
    """The newest checkpoints of a lineage's runs that have made no model; most steps first.

    Args:
        store: where they lie.
        names: of all runs there that have checkpoints.
        lineage: what they have in common.
    """
    from stillhouse.training.checkpoint import Checkpoints  # brings torch

    found: list[Origin] = []
    for name in names:
        if not name.startswith(lineage[:_HALF]) or store.find_manifest("models", name) is not None:
            continue
        for step in Checkpoints(store, name, {}).steps()[-1:]:
            of: Mapping[str, Any] = store.get_manifest(CHECKPOINTS, f"{name}/{step:08d}").settings
            arms = tuple((arm, part) for arm, part in of["arms"])
            found.append(Origin(name, step, arms, of["tokenizer"]))
    return sorted(found, key=lambda origin: (-origin.step, origin.name))


def choose_origin(origins: Sequence[Origin], arms: Arms, rule: Rule, label: str) -> Origin | None:
    """The run to go on from with `arms`; None for a run of its own.

    Args:
        origins: unfinished runs, the preferred one first.
        arms: of the spec.
        rule: of the spec.
        label: of the run, for messages.

    Raises:
        SpecError: there are only runs with other arms, which the rule does not let be.
    """
    others = [origin for origin in origins if list(origin.arms) != list(arms)]
    if rule == "fresh" or not others:
        return None
    if rule == "extend":
        for origin in others:
            if {*origin.arms} <= {*arms}:
                return origin
    first = others[0]
    way = "only adding arms is possible" if rule == "extend" else "`arms: extend` may add arms"
    raise SpecError(
        f"the run of {label} has stopped at step {first.step} with a checkpoint of other arms: "
        f"{difference(first.arms, arms)}: {way}, `arms: fresh` begins again"
    )


def difference(there: Arms, here: Arms) -> str:
    """How the arms `there` differ from those `here`, by name."""
    before, now = dict(there), dict(here)
    both = before.keys() & now.keys()
    found = {
        "gone from the spec": before.keys() - now.keys(),
        "new": now.keys() - before.keys(),
        "with other rows": {name for name in both if before[name] != now[name]},
    }
    said = [f"{what}: {sorted(names)}" for what, names in found.items() if names]
    return ", ".join(said) or "in another order"
