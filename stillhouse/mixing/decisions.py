"""The log of a mixer's decisions as Parquet: enough to recompute a run's draws, or replay them.

One row a micro-batch: `step` and `slot` (both from 0), the `uniform` number that was drawn, the
`arm` it fell on, that arm's `reward` in the step (null: none, or not finite) and, in slot 0 of
every n-th step, the law in force (`probabilities`, and `indices` where the policy plays a maximum);
the laws between follow from the rewards. The names of the arms are in the schema's metadata.
"""

import hashlib
import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import InputError
from stillhouse.storage.parquet import parquet_bytes, parse_table

_ARMS = b"stillhouse.arms"
_REGIME = b"stillhouse.regime"
_COLUMNS = [
    pa.field("step", pa.int64()),
    pa.field("slot", pa.int32()),
    pa.field("uniform", pa.float64()),
    pa.field("arm", pa.int32()),
    pa.field("reward", pa.float64()),
    pa.field("probabilities", pa.list_(pa.float64())),
    pa.field("indices", pa.list_(pa.float64())),
]

_QUANTUM = 2.0**-10


def quantise(reward: float) -> float:
    """The nearest multiple of 2^-10 (halves to even), so that summation order rarely matters."""
    return float(np.rint(reward / _QUANTUM) * _QUANTUM)


@dataclass(frozen=True, slots=True)
class Decision:
    """One row of the log."""

    step: int
    slot: int
    uniform: float
    arm: int
    reward: float | None = None
    probabilities: list[float] | None = None
    indices: list[float] | None = None


def write_decisions(
    decisions: Sequence[Decision], arms: Sequence[str], regime: Mapping[str, Any] | None = None
) -> bytes:
    """A part of the log as a Parquet file.

    Args:
        decisions: rows, in order.
        arms: names of all K arms in their order.
        regime: JSON values that a replay has to know beside the draws.
    """
    metadata = {
        _ARMS: json.dumps(list(arms)).encode(),
        _REGIME: json.dumps(dict(regime or {})).encode(),
    }
    schema = pa.schema(_COLUMNS, metadata=metadata)
    table = pa.Table.from_pylist([asdict(decision) for decision in decisions], schema=schema)
    return parquet_bytes(table)


def read_decisions(parts: Iterable[bytes]) -> tuple[list[Decision], list[str]]:
    """The decisions of all parts, by step and slot, and the arms' names.

    A row that two parts hold, because a run was killed between log and checkpoint, is kept once.

    Raises:
        InputError: no part, or parts of runs with different arms or different decisions.
    """
    rows: dict[tuple[int, int], Decision] = {}
    names: list[list[str]] = []
    for part in parts:
        table = parse_table(part)
        names.append(json.loads(table.schema.metadata[_ARMS]))
        for row in table.to_pylist():
            decision = Decision(**row)
            first = rows.setdefault((decision.step, decision.slot), decision)
            if first.arm != decision.arm or names[-1] != names[0]:
                raise InputError(
                    f"step {decision.step}, slot {decision.slot} is in two parts of the log that "
                    "disagree: `policy.log` must name the decisions of one run"
                )
    if not names:
        raise InputError("the log of decisions has no parts: check `policy.log`")
    return [rows[place] for place in sorted(rows)], names[0]


def read_regime(part: bytes) -> dict[str, Any]:
    """What `write_decisions` was told beside the draws."""
    return json.loads(pq.read_schema(io.BytesIO(part)).metadata[_REGIME])


def chain(previous: str, step: int, arms: Sequence[int]) -> str:
    """SHA-256 of all steps so far: of the previous hex digest, the step and its arms in order."""
    packed = struct.pack(f"<{1 + len(arms)}q", step, *arms)
    return hashlib.sha256(previous.encode() + packed).hexdigest()
