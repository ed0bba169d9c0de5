"""What a step of a plan would cost: its tokens and FLOPs, and seconds as earlier runs took."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.pipelines.context import StepWork
from stillhouse.spec import ComputeSettings
from stillhouse.storage.artifact import Store
from stillhouse.storage.filesystem import join, list_names
from stillhouse.storage.run_record import read_json, read_status

_MAX_RUNS = 50
_PASSES = {"train": 3, "score": 1}
"""Forward passes a token, by the first word of a step that runs a language model."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """What steps took in the newest runs of a store that did something in them.

    `flops` a second of one worker, by step and by its first word; wall `seconds` of a part.
    """

    flops: Mapping[str, float]
    seconds: Mapping[str, float]


def speeds_of(store: Store) -> Speeds:
    """Read from the records of a store's finished runs; nothing is tried out."""
    folder = store.path("runs")
    runs = [(read_status(join(folder, name)), join(folder, name)) for name in list_names(folder)]
    done = [(found, uri) for found, uri in runs if found and found.get("state") == "done"]
    done.sort(key=lambda run: run[0]["updated"], reverse=True)
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for found, uri in done[:_MAX_RUNS]:
        cost = (read_json(uri, "result.json") or {}).get("cost", {})
        for name, step in found["steps"].items():
            made = step.get("parts", 0) - step.get("reused", 0)
            if made <= 0 or "seconds" not in step:
                continue
            seconds.setdefault(name, step["seconds"] / made)
            busy = cost.get("device_seconds", {}).get(name, 0)
            counted = cost.get("flops", {}).get(name, 0) * made / step["parts"]
            if busy and counted:
                flops.setdefault(name, counted / busy)
                flops.setdefault(name.split()[0], counted / busy)
    return Speeds(flops, seconds)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step reads or makes.

    Attributes:
        known: tokens of the input that is there.
        new: tokens of the input that is to come.
        flops_per_token: of a forward pass of its language model; 0 without one, None where they
            are not known.
        new_parts: of what is to come.
    """

    known: float
    new: float = 0
    flops_per_token: float | None = 0
    new_parts: int = 0


def cost_row(
    name: str,
    work: StepWork | None,
    estimate: Estimate,
    speeds: Speeds,
    compute: ComputeSettings,
) -> dict[str, Any]:
    """A step as `plan --json` has it: parts (None: not known yet), reused, and what is left."""
    parts = work.parts + estimate.new_parts if work else None
    reused = work.reused if work else 0
    found = work.reused / work.parts if work and work.parts else 0
    passes = _PASSES.get(name.split()[0], 0)
    left = estimate.new + estimate.known * (1 - found)
    each = estimate.flops_per_token
    flops = None if each is None else passes * each * left
    width = compute.trainers if passes == 3 else compute.scorers
    return {
        "parts": parts,
        "reused": reused,
        "tokens": round(estimate.known + estimate.new),
        "flops": flops,
        "seconds": _seconds(name, parts, reused, (flops or 0) / width, speeds),
    }


def _seconds(
    name: str, parts: int | None, reused: int, flops: float, speeds: Speeds
) -> float | None:
    """How long what is left takes; None where the store knows no such step."""
    if parts == reused:
        return 0.0
    if flops:
        rate = speeds.flops.get(name) or speeds.flops.get(name.split()[0])
        return flops / rate if rate else None
    if parts is None or name not in speeds.seconds:
        return None
    return (parts - reused) * speeds.seconds[name]


def parts_row(
    work: StepWork | None, speeds: Speeds, name: str, parts: int | None = None, **amounts: int
) -> dict[str, Any]:
    """The same for a step whose tokens nobody counts: `parts` as asked for, and other amounts."""
    parts = work.parts if work else parts
    reused = work.reused if work else 0
    seconds = _seconds(name, parts, reused, 0, speeds)
    row = {"parts": parts, "reused": reused, "tokens": None, "flops": None, "seconds": seconds}
    return row | (amounts if parts != reused else {})
