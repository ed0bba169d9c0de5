"""A log of decisions in the store: the parts of one run's folder, one run for each seed."""

from typing import Any

import yaml

from stillhouse.errors import InputError
from stillhouse.fingerprint import sha256
from stillhouse.mixing.decisions import read_regime
from stillhouse.storage.filesystem import absolute_uri, join, list_names, read_bytes, read_many
from stillhouse.storage.run_record import read_json


def logs_of(uri: str) -> dict[int, str]:
    """Folders of logs by seed: of a finished `job: mix`, those of its policy; or one log's folder.

    Raises:
        InputError: neither a run that mixed nor a log.
    """
    folder = absolute_uri(uri)
    result = read_json(folder, "result.json")
    if result is None:
        return {read_regime(read_bytes(log_names(folder)[0]))["seed"]: folder}
    if result["job"] != "mix":
        raise InputError(f"{uri} is a run of `job: {result['job']}`: it decided nothing to replay")
    spec = yaml.safe_load(read_bytes(join(folder, "spec.yaml")))
    logs = result["artifacts"]["decisions"][spec["policy"]["name"]]
    return {int(seed): log for seed, log in logs.items()}


def log_names(uri: str) -> list[str]:
    """URIs of the parts, in order.

    Raises:
        InputError: there are none.
    """
    folder = absolute_uri(uri)
    names = [name for name in list_names(folder) if name.endswith(".parquet")]
    if not names:
        raise InputError(f"{uri} holds no log of decisions (`policy.log`)")
    return [join(folder, name) for name in names]


def log_parts(uri: str) -> list[bytes]:
    """The parts, in order. InputError: there are none."""
    return read_many(log_names(uri))


def read_log_regime(uri: str) -> dict[str, Any]:
    """What the log says of its run beside the draws. InputError: there is no log."""
    return read_regime(read_bytes(log_names(uri)[0]))


def log_digest(uri: str) -> str:
    """SHA-256 over the parts. InputError: there are none."""
    return sha256(b"".join(log_parts(uri)))
