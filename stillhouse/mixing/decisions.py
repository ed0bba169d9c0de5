"""The log of a mixer's decisions as Parquet: enough to recompute a run's draws, or replay them.

A run has a folder of parts for each of its seeds. One row a micro-batch: `step` and `slot` (both
from 0), the `uniform` number that was drawn, the `arm` it fell on, that arm's `reward` in the step
(null: none, or not finite) and, in slot 0 of every n-th step, the distribution in force
(`probabilities`, and `indices` where the policy plays a maximum); those between follow from the
rewards. The schema's metadata hold the arms' names and what a replay has to know besides.
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
import yaml

from stillhouse.errors import InputError
from stillhouse.storage.filesystem import absolute_uri, join, list_names, read_bytes, read_many
from stillhouse.storage.parquet import parquet_bytes, parse_table
from stillhouse.storage.run_record import read_json

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


def quantise(reward: float) -> float:
    """The nearest multiple of 2^-10 (halves to even), so that summation order rarely matters."""
    return float(np.rint(reward / _QUANTUM) * _QUANTUM)


def chain(previous: str, step: int, arms: Sequence[int]) -> str:
    """SHA-256 of all steps so far: of the previous hex digest, the step and its arms in order."""
    packed = struct.pack(f"<{1 + len(arms)}q", step, *arms)
    return hashlib.sha256(previous.encode() + packed).hexdigest()


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


def logs_of(uri: str) -> dict[int, str]:
    """Folders of logs by seed: of a finished `job: mix`, those of its policy; or one log's folder.

    Raises:
        InputError: neither a run that mixed nor a log.
    """
    folder = absolute_uri(uri)
    result = read_json(folder, "result.json")
    if result is None:
        return {read_regime(folder)["seed"]: folder}
    if result["job"] != "mix":
        raise InputError(f"{uri} is a run of `job: {result['job']}`: it decided nothing to replay")
    spec = yaml.safe_load(read_bytes(join(folder, "spec.yaml")))
    label = spec["policy"]["name"].rpartition(":")[2]
    logs = result["artifacts"]["decisions"][label]
    return {int(seed): log for seed, log in logs.items()}


def log_parts(uri: str) -> list[bytes]:
    """The parts of one seed's log, in order. InputError: there are none."""
    return read_many(_parts(uri))


def read_regime(uri: str) -> dict[str, Any]:
    """What a seed's log says of its run beside the draws. InputError: there is no log."""
    first = io.BytesIO(read_bytes(_parts(uri)[0]))
    return json.loads(pq.read_schema(first).metadata[_REGIME])


def _parts(uri: str) -> list[str]:
    folder = absolute_uri(uri)
    names = [name for name in list_names(folder) if name.endswith(".parquet")]
    if not names:
        raise InputError(f"{uri} holds no log of decisions (`policy.log`)")
    return [join(folder, name) for name in names]
