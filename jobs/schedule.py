"""`stillhouse schedule`: manifests for Kubernetes, or a crontab line, that run a spec every time.

A scheduled run with unchanged inputs finds its finished result and ends; overlapping runs adopt
each other's parts. So nothing here has to lock anything.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import yaml

from stillhouse.errors import ClusterError, SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.jobs.cron import check_cron, least_gap_s
from stillhouse.jobs.manifests import PLACES, Manifests
from stillhouse.jobs.paths import refuse_local_paths
from stillhouse.spec import JobSpec
from stillhouse.storage.filesystem import read_bytes

Kind = Literal["raycronjob", "cronjob", "crontab"]
_NAME = 18
"""Letters of an object's name that are its own: KubeRay appends to it twice."""
_LABEL = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a scheduled job runs. `address`: the dashboard's URL of a running cluster."""

    address: str | None = None
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

    Args:
        path: of the spec, as the user gave it; what a crontab line runs.
        spec: what is in it after `sets`; Kubernetes gets a copy of this in a ConfigMap.
        sets: the `--set` options.
        cron: the cron line, in `place.time_zone`.
        kind: RayCronJob (a cluster for each run), CronJob (submits to a running cluster), crontab.
        place: where.

    Raises:
        SpecError: a bad cron line, local paths for Kubernetes, no image, no address.
    """
    when = check_cron(cron)
    _check_place(kind, place)
    if kind == "crontab":
        return _crontab(path, spec, sets, when, place)
    refuse_local_paths(spec, f"a {'RayCronJob' if kind == 'raycronjob' else 'CronJob'}")
    if place.image is None:
        raise SpecError(f"--kind {kind} needs --image: build one from the Dockerfile")
    gap_s = least_gap_s(when, place.time_zone)
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


def _read_merged(path: str) -> dict[str, Any]:
    """A file of `--merge`: mappings under the keys of PLACES."""
    try:
        found = yaml.safe_load(read_bytes(path))
    except FileNotFoundError:
        raise SpecError(f"--merge {path}: no such file") from None
    except yaml.YAMLError as error:
        raise SpecError(f"--merge {path} is not YAML: {error}") from None
    if not isinstance(found, dict) or any(not isinstance(v, dict) for v in found.values()):
        raise SpecError(
            f"--merge {path}: a mapping of mappings is needed, under {', '.join(PLACES)}"
        )
    unknown = [str(key) for key in found if key not in PLACES]
    if unknown:
        raise SpecError(f"--merge {path}: unknown key `{unknown[0]}`; known: {', '.join(PLACES)}")
    return found


def _check_place(kind: Kind, place: Place) -> None:
    """Refuse what the kind has no use for, and an address that `submit` would refuse every time."""
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
    if place.service_account is not None and not re.fullmatch(_LABEL, place.service_account):
        raise SpecError(f"--service-account {place.service_account!r} is no name in Kubernetes")
    if place.time_zone is not None:
        try:
            ZoneInfo(place.time_zone)
        except (KeyError, ValueError, OSError):
            raise SpecError(
                f"--time-zone {place.time_zone!r} is no time zone: use a name such as Europe/Berlin"
            ) from None
    if place.address is not None:
        from stillhouse.jobs.ray_jobs import dashboard_url  # brings Ray

        try:
            dashboard_url(place.address)
        except ClusterError as error:
            raise SpecError(str(error)) from None


def object_name(path: str, spec: JobSpec) -> str:
    """What the objects are called: after `publish`, `name` or the file, as Kubernetes allows.

    Six more digits keep apart what would be called alike, and are the same every time.
    """
    given = spec.publish or spec.name
    plain = re.sub(r"[^a-z0-9]+", "-", (given or Path(path).stem).lower())
    digits = fingerprint([spec.store, given or path])[:6]
    return f"stillhouse-{plain.strip('-')[:_NAME].strip('-') or 'job'}-{digits}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


_VARIABLES = (
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
"""What a crontab line takes over of today's environment, where it is set: no secret is among it."""
_AT_WORK = 75
"""What `flock` ends with where the run before is still at work."""


def _crontab(path: str, spec: JobSpec, sets: Sequence[str], when: str, place: Place) -> str:
    """A comment and the line; the job runs in today's working directory, one at a time."""
    verb = ["run", path] if place.address is None else ["submit", path]
    options = [word for override in sets for word in ("--set", override)]
    if place.address is not None:
        options += ["--address", place.address, "--follow"]
    name = object_name(path, spec)
    variables = [f"{key}={os.environ[key]}" for key in _VARIABLES if os.environ.get(key)]
    program = str(Path(sys.executable).with_name("stillhouse"))
    lock = ["flock", "-n", "-E", str(_AT_WORK), f"{name}.lock"]
    command = shlex.join([*lock, "env", *variables, program, *verb, *options])
    told = f'date; {command}; code=$?; echo "exit code $code"; exit $code'
    line = f"cd {shlex.quote(str(Path.cwd()))} && {{ {told}; }} >> {name}.log 2>&1"
    if "\n" in line:
        raise SpecError("a crontab line cannot hold a line break: put that setting into the spec")
    escaped = line.replace("%", r"\%")  # cron would end the command at a bare %
    return (
        f"# {name}: output and exit codes go to {name}.log; {_AT_WORK}: the run before is still at "
        f"work\n{when} {escaped}\n"
    )
