"""`stillhouse schedule`: Kubernetes manifests, or a crontab line, that run a spec by the clock.

A scheduled run with unchanged inputs finds its finished result and ends; overlapping runs reuse
each other's parts. So nothing has to be locked here.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import yaml
from cronsim import CronSim, CronSimError

from stillhouse.errors import ClusterError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.kubernetes import PLACES, Manifests
from stillhouse.jobs.paths import refuse_local_paths
from stillhouse.spec import JobSpec
from stillhouse.storage.filesystem import read_bytes

Kind = Literal["raycronjob", "cronjob", "crontab"]
_NAME_LENGTH = 18
"""Of the readable part of an object's name: KubeRay appends to it twice."""
_SERVICE_ACCOUNT = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MAX_OCCURRENCES = 5_000
_ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "HF_HOME",
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "SSL_CERT_FILE",
)
"""Variables of today's environment that a crontab line sets again: none of them is a secret."""
_STILL_RUNNING = 75
"""Exit code of `flock` while the previous run holds the lock."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a scheduled job runs."""

    address: str | None = None
    """The dashboard's URL of a running cluster."""
    image: str | None = None
    service_account: str | None = None
    time_zone: str | None = None
    """Of the cron line, such as Europe/Berlin."""
    merged: str | None = None
    """A YAML file whose content is merged into the manifests."""


def schedule(
    path: str, spec: JobSpec, sets: Sequence[str], cron: str, kind: Kind, place: Place
) -> str:
    """The text to apply: YAML documents, or lines for `crontab`.

    A crontab line runs the spec at `path` with the options `--set`; Kubernetes gets a copy of
    `spec`, which has `sets` applied, in a ConfigMap.

    Raises:
        SpecError: a bad cron line, local paths for Kubernetes, no image, no address.
    """
    gap_s = least_gap_s(cron, place.time_zone)
    when = " ".join(cron.split())
    _check_place(kind, place)
    if kind == "crontab":
        return _crontab(path, spec, sets, when, place)
    refuse_local_paths(spec, f"a {'RayCronJob' if kind == 'raycronjob' else 'CronJob'}")
    if place.image is None:
        raise SpecError(f"--kind {kind} needs --image: build one from the Dockerfile")
    merged = _read_merged(place.merged) if place.merged else {}
    made = Manifests(object_name(path, spec), spec, place.image, place.service_account, merged)
    if kind == "raycronjob":
        documents = made.ray_cron_job(when, place.time_zone, gap_s)
    elif place.address is None:
        raise SpecError(
            "--kind cronjob submits to a running cluster: give --address, "
            "such as http://NAME-head-svc:8265"
        )
    else:
        documents = made.cron_job(when, place.time_zone, gap_s, place.address)
    return "---\n".join(yaml.dump(d, Dumper=_Dumper, sort_keys=False) for d in documents)


def least_gap_s(line: str, zone: str | None = None) -> int:
    """The shortest time between two runs of a cron line, in seconds, over nine years.

    In a time zone an hour less where clocks may be put forward in between.

    Raises:
        SpecError: not five fields or a macro such as `@daily` that cron and Kubernetes both read,
            or a day that never comes.
    """
    fields = _MACROS.get(line.strip(), line).split()
    allowed = f"give minute, hour, day of month, month, weekday, or one of {', '.join(_MACROS)}"
    if len(fields) != 5:
        raise SpecError(f"--cron {line!r} has {len(fields)} fields, not 5: {allowed}")
    if re.search("[LW]", fields[2].upper()) or re.search("[7L#]", fields[4].upper()):
        raise SpecError(
            f"--cron {line!r}: cron and Kubernetes both read plain days, and weekdays 0 to 6 "
            "(0 is Sunday), or sun to sat"
        )
    start = datetime(2000, 1, 1)
    end = start + timedelta(days=9 * 366)
    try:
        coming = takewhile(lambda time: time < end, CronSim(" ".join(fields), start))
        gaps = [later - earlier for earlier, later in pairwise(islice(coming, _MAX_OCCURRENCES))]
    except CronSimError as error:
        raise SpecError(f"--cron {line!r}: {str(error).lower()}: {allowed}") from None
    least, hour = min(gaps), timedelta(hours=1)
    changes = zone not in {None, "Etc/UTC", "UTC"} and least > 2 * hour
    return int((least - hour if changes else least).total_seconds())


def _check_place(kind: Kind, place: Place) -> None:
    """Refuse options that a kind does not have, and an address that `submit` would refuse."""
    unused = {
        "raycronjob": {"--address": place.address},
        "cronjob": {},
        "crontab": {
            "--image": place.image,
            "--service-account": place.service_account,
            "--merge": place.merged,
            "--time-zone": place.time_zone,  # cron has the machine's
        },
    }[kind]
    for option, value in unused.items():
        if value is not None:
            raise SpecError(f"--kind {kind} has no use for {option}")
    account = place.service_account
    if account is not None and not re.fullmatch(_SERVICE_ACCOUNT, account):
        raise SpecError(f"--service-account {account!r} is not a valid name in Kubernetes")
    if place.time_zone is not None:
        try:
            ZoneInfo(place.time_zone)
        except (KeyError, ValueError, OSError):
            raise SpecError(
                f"--time-zone {place.time_zone!r} is unknown: use a name such as Europe/Berlin"
            ) from None
    if place.address is not None:
        from stillhouse.jobs.ray_jobs import dashboard_url  # brings Ray

        try:
            dashboard_url(place.address)
        except ClusterError as error:
            raise SpecError(str(error)) from None


def _read_merged(path: str) -> dict[str, Any]:
    """The file of `--merge`: mappings under the keys of PLACES."""
    try:
        found = yaml.safe_load(read_bytes(path))
    except FileNotFoundError:
        raise SpecError(f"--merge {path}: no such file") from None
    except yaml.YAMLError as error:
        raise SpecError(f"--merge {path} is not YAML: {error}") from None
    known = ", ".join(PLACES)
    if not isinstance(found, dict) or any(not isinstance(v, dict) for v in found.values()):
        raise SpecError(f"--merge {path}: a mapping of mappings is needed, under {known}")
    unknown = [str(key) for key in found if key not in PLACES]
    if unknown:
        raise SpecError(f"--merge {path}: unknown key `{unknown[0]}`; known: {known}")
    return found


def object_name(path: str, spec: JobSpec) -> str:
    """The name of the objects: `publish`, `name` or the file, in letters that Kubernetes allows.

    Six digits of a fingerprint keep apart schedules whose readable parts are equal.
    """
    given = spec.publish or spec.name
    plain = re.sub(r"[^a-z0-9]+", "-", (given or Path(path).stem).lower())
    digits = fingerprint([spec.store, given or path])[:6]
    return f"stillhouse-{plain.strip('-')[:_NAME_LENGTH].strip('-') or 'job'}-{digits}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _crontab(path: str, spec: JobSpec, sets: Sequence[str], when: str, place: Place) -> str:
    """A comment and the line; the job runs in today's working directory, one at a time."""
    verb = ["run", path] if place.address is None else ["submit", path]
    options = [word for override in sets for word in ("--set", override)]
    if place.address is not None:
        options += ["--address", place.address, "--follow"]
    name = object_name(path, spec)
    variables = [f"{key}={os.environ[key]}" for key in _ENVIRONMENT if os.environ.get(key)]
    program = str(Path(sys.executable).with_name("stillhouse"))
    lock = ["flock", "-n", "-E", str(_STILL_RUNNING), f"{name}.lock"]
    command = shlex.join([*lock, "env", *variables, program, *verb, *options])
    logged = f'date; {command}; code=$?; echo "exit code $code"; exit $code'
    line = f"cd {shlex.quote(str(Path.cwd()))} && {{ {logged}; }} >> {name}.log 2>&1"
    if "\n" in line:
        raise SpecError("a crontab line cannot hold a line break: put that setting into the spec")
    escaped = line.replace("%", r"\%")  # cron ends the command at a bare %
    return (
        f"# {name}: output and exit codes go to {name}.log; {_STILL_RUNNING}: the previous run is "
        f"still running\n{when} {escaped}\n"
    )
