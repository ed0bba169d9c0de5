"""The log of a run's decisions as Parquet, and the policy that replays it.

A run has a folder of parts for each of its seeds, with one row for each micro-batch: `step` and
`slot` (both from 0), the `uniform` number that was drawn, the `arm` it selected, that arm's
`reward` in the step (null if there was none, or it was not finite) and, in slot 0 of every n-th
step, the distribution (`probabilities`, and `indices` for a policy that plays a maximum); the
distributions in between follow from the rewards. The schema's metadata hold the arms' names and
what a replay needs beside the draws (`MixTask.regime`).
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
from pydantic import Field

from stillhouse.errors import InputError, SpecError
from stillhouse.fingerprint import sha256
from stillhouse.mixing.policy import Distribution, MixFacts, Policy, State, StepPlan
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


def chain(previous: str, step: int, arms: Sequence[int]) -> str:
    """SHA-256 over all steps so far: of the previous hex digest, the step and its arms in order."""
    packed = struct.pack(f"<{1 + len(arms)}q", step, *arms)
    return hashlib.sha256(previous.encode() + packed).hexdigest()


def write_decisions(
    decisions: Sequence[Decision], arms: Sequence[str], regime: Mapping[str, Any] | None = None
) -> bytes:
    """A part of the log as a Parquet file.

    Args:
        decisions: rows, in order.
        arms: names of all K arms in order.
        regime: JSON values that a replay needs beside the draws.
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

    Rows that are in two parts, because a run was killed between log and checkpoint, are kept once.

    Args:
        parts: at least one.

    Raises:
        InputError: parts of runs with different arms or different decisions.
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
    return [rows[place] for place in sorted(rows)], names[0]


def log_parts(uri: str) -> list[bytes]:
    """The parts of one seed's log, in order.

    Raises:
        InputError: there are none.
    """
    return read_many(_parts(uri))


def _parts(uri: str) -> list[str]:
    folder = absolute_uri(uri)
    names = [name for name in list_names(folder) if name.endswith(".parquet")]
    if not names:
        raise InputError(f"{uri} holds no log of decisions (`policy.log`)")
    return [join(folder, name) for name in names]


def _regime(uri: str) -> dict[str, Any]:
    """`MixTask.regime` of the run that wrote a seed's log."""
    first = io.BytesIO(read_bytes(_parts(uri)[0]))
    return json.loads(pq.read_schema(first).metadata[_REGIME])


def _logs_by_seed(uri: str) -> dict[int, str]:
    """Folders of logs by seed: those of a finished mix job's policy, or one log's own folder.

    Raises:
        InputError: neither a run that mixed nor a log.
    """
    folder = absolute_uri(uri)
    result = read_json(folder, "result.json")
    if result is None:
        return {_regime(folder)["seed"]: folder}
    if result["job"] != "mix":
        raise InputError(
            f"{uri} is a run of `job: {result['job']}`, which logs no decisions: name a mix job's"
        )
    spec = yaml.safe_load(read_bytes(join(folder, "spec.yaml")))
    label = spec["policy"]["name"].rpartition(":")[2]
    logs = result["artifacts"]["decisions"][label]
    return {int(seed): log for seed, log in logs.items()}


class Replay(Policy):
    """Replays the decisions of an earlier run."""

    log: str = Field(description="a run (URI), or the folder of one seed's decisions")

    def plan(self, target_batches: int) -> StepPlan:
        """Steps like those of the logged run, without rewards."""
        return StepPlan(self._logged_regime()["target_batches"])

    def check(self, accumulation: int, micro_batch: int) -> None:
        """The log is there, has steps of this size, and its draws alone reproduce the run."""
        regime = self._logged_regime()
        if regime["weighted"]:
            raise SpecError(
                f"`policy.log` is of `{regime['policy']}`, which weights losses: its draws alone "
                "do not reproduce the run"
            )
        for key, name, value in (
            ("slots", "accumulation", accumulation),
            ("micro_batch", "micro_batch", micro_batch),
        ):
            if regime[key] != value:
                raise SpecError(
                    f"`policy.log` was written with `train.{name}: {regime[key]}`, not {value}"
                )

    def start(self, facts: MixFacts) -> State:
        logs = _logs_by_seed(self.log)
        if facts.seed not in logs:
            seeds = ", ".join(map(str, logs))
            raise SpecError(f"`policy.log` is of seed {seeds}: set `seeds: [{seeds}]` to replay it")
        decisions, logged = read_decisions(log_parts(logs[facts.seed]))
        if logged != list(facts.arms):
            different = sorted({*logged} ^ {*facts.arms}) or "only in their order"
            raise InputError(
                f"the arms of the log and of `auxiliary` differ: {different}; replay with the arms "
                "of the run that wrote it"
            )
        arms = [decision.arm for decision in decisions]
        return {"_arms": arms, "_num_arms": len(logged), "place": 0}

    def probabilities(self, state: State) -> Distribution:
        """One-hot of the next logged arm."""
        choice = np.zeros(state["_num_arms"])
        choice[_next_arm(state)] = 1
        return choice

    def play(self, state: State, uniform: float) -> int:
        """The next logged arm; `uniform` is ignored."""
        arm = _next_arm(state)
        state["place"] += 1
        return arm

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """The content of the logs, of one seed or of all, wherever they are stored."""
        logs = _logs_by_seed(self.log)
        wanted = [logs[seed]] if seed in logs else list(logs.values())
        return {"name": self.name, "log_sha256": [sha256(b"".join(log_parts(w))) for w in wanted]}

    def _logged_regime(self) -> dict[str, Any]:
        """The regime that the logs of all seeds share."""
        return _regime(next(iter(_logs_by_seed(self.log).values())))


def _next_arm(state: State) -> int:
    if state["place"] >= len(state["_arms"]):
        raise InputError(
            f"the log of decisions ends after {state['place']:,} micro-batches: lower "
            "`train.num_steps` to what it holds"
        )
    return state["_arms"][state["place"]]
