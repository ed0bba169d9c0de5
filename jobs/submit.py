"""`stillhouse submit`: a spec, checked here, run on a Ray cluster that is already up.

The job's working directory there is a small zip: our own code, the code of the user's that the
spec names, the spec, and the versions of the libraries that it is tested with.
"""

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import stillhouse
from stillhouse.classification.spec import ClassifySpec
from stillhouse.custom_code import CustomCode, find_named
from stillhouse.data_settings import reader_code
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import SpecError
from stillhouse.fingerprint import fingerprint
from stillhouse.generation.spec import GenerateSpec
from stillhouse.jobs.chain import Chain, list_spec
from stillhouse.jobs.chain_spec import AnySpec, ChainSpec
from stillhouse.jobs.kinds import Job
from stillhouse.jobs.paths import refuse_local_paths, with_absolute_paths
from stillhouse.jobs.publish import check_name
from stillhouse.jobs.ray_jobs import Cluster
from stillhouse.jobs.run import SUBMISSION_VARIABLE
from stillhouse.jobs.sweep_spec import SweepSpec
from stillhouse.mixing.policy import POLICIES
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.train_data import own_objective
from stillhouse.selection.own import find_code
from stillhouse.selection.rules import rules_of
from stillhouse.spec import JobSpec, SelectSpec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.storage.filesystem import remember_options, use_options
from stillhouse.training.spec import TrainSpec

PACKAGE = Path(stillhouse.__file__).parent
MAX_BYTES = 4_000_000
_SPEC_FILE = "spec.yaml"
_VERSIONS_FILE = "versions.json"
_SUFFIXES = {".py", ".j2", ".css"}
_VERSION = 1


def run_submit(
    spec: AnySpec, address: str | None, *, follow: bool, command: str, quiet: bool
) -> tuple[dict[str, Any], int]:
    """Submit a job, or attach to it, and show its output to the end with `follow`.

    `command` is what the user types to come back; `quiet` keeps stdout free. Returns the object
    that `submit --json` prints, and the exit code.
    """

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def write(text: str) -> None:
        print(text, end="", file=sys.stderr if quiet else sys.stdout, flush=True)

    cluster = Cluster(address)
    job = submit_job(spec, cluster)
    verb = "attached to" if job["attached"] else "submitted"
    tell(f"{verb} job {job['job_id']} (attempt {job['attempt']}) at {cluster.url}")
    if not follow:
        tell(f"next:   {command}")
        return job, 0
    try:
        ended = _follow(cluster, job["job_id"], write)
    except KeyboardInterrupt:
        tell(f"\nthe job goes on; come back with: {command}")
        return job | {"state": "RUNNING"}, 4
    if ended["exit_code"]:
        tell(f"job {ended['state'].lower()}: {ended['message']}")
    return job | ended, ended["exit_code"]


def submit_job(spec: AnySpec, cluster: Cluster) -> dict[str, Any]:
    """Check the spec and its inputs, then submit it, or attach to an attempt that is not over.

    Local paths are accepted only for a cluster on this machine.

    Raises:
        StillhouseError: a local path, data or a store that cannot be reached, a cluster that does
            not answer.
    """
    python = "python"  # what an image has on its PATH
    if cluster.is_this_machine():
        spec, python = with_absolute_paths(spec), shlex.quote(sys.executable)
    else:
        refuse_local_paths(spec, f"the cluster at {cluster.url}")
    name = submission_name(spec, check_reach(spec))
    job = {"address": cluster.url, "store": spec.store}
    while True:
        attempts = cluster.attempts(name)
        latest = max(attempts, default=0)
        if attempts and not attempts[latest].status.is_terminal():
            job_id = f"{name}-{latest}"
            return job | {"job_id": job_id, "attempt": latest, "attached": True, "sent_bytes": 0}
        job_id = f"{name}-{latest + 1}"
        run = f"{python} -m stillhouse.jobs.cli run {_SPEC_FILE}"
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "job.zip"
            size = write_package(package, spec)
            started = cluster.start(
                job_id,
                f"{SUBMISSION_VARIABLE}={job_id} {run}",
                package,
                {"stillhouse_store": spec.store, "stillhouse_name": spec.name or ""},
                spec.scorer.pip if isinstance(spec, SelectSpec) and spec.scorer else [],
            )
        if started:
            new = {"job_id": job_id, "attempt": latest + 1, "attached": False, "sent_bytes": size}
            return job | new


def check_reach(spec: AnySpec) -> Job | Chain:
    """Check from here that data, models and store can be read, and that `publish` is free."""
    use_options(spec.store, spec.storage_options)
    remember_options(spec.store, spec.storage_options)
    job = list_spec(spec)
    check_name(Store(check_store(spec.store)), spec)
    return job


def submission_name(spec: AnySpec, job: Job | Chain) -> str:
    """The fingerprint of a job before its data are read: of the spec and the listed files.

    Widths do not count: submitting again with others attaches to the running job.
    """
    content = spec.model_dump(mode="json", exclude={"compute", "name"})
    files = [[[file.uri, file.size_bytes, file.stamp] for file in part] for part in job.files]
    code = [code.digest for code in own_code(spec)] or None
    return fingerprint(["submission", _VERSION, content, files, code])


def _follow(cluster: Cluster, job_id: str, write: Callable[[str], object]) -> dict[str, Any]:
    """Write the job's output to its end; its `state`, `exit_code` and `message`."""
    job = cluster.follow(job_id, write)
    state = job.status.value
    code = job.driver_exit_code
    if code is None or (code != 0) != (state == "FAILED"):
        code = {"SUCCEEDED": 0, "STOPPED": 4}.get(state, 1)
    if job.driver_exit_code is None:
        message = (job.message or "").strip().partition("\n")[0]
    else:  # the rest of the job's message repeats its output
        message = f"exit code {job.driver_exit_code}"
    return {"state": state, "exit_code": code, "message": message}


def write_package(path: Path, spec: JobSpec) -> int:
    """Write the zip that a job needs; the same spec gives the same bytes. Returns its size.

    Ray would zip a folder as well, but without compressing it.

    Raises:
        SpecError: more than `MAX_BYTES`, naming the largest file.
    """
    files = code_files(PACKAGE)
    for code in own_code(spec):  # found there as it is here: in the working directory
        files |= dict(code.files)
    files[_SPEC_FILE] = spec.to_send().encode()
    files[_VERSIONS_FILE] = json.dumps(library_versions(PACKAGE.parent), indent=1).encode()
    check_size(files)
    with ZipFile(path, "w") as archive:
        for name, data in sorted(files.items()):
            entry = ZipInfo(name)  # dated 1980, whenever it is written
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, ZIP_DEFLATED)
    return path.stat().st_size


def own_code(spec: JobSpec) -> list[CustomCode]:
    """The user's code that a spec names: readers, scorers, networks, policies, objectives.

    Raises:
        SpecError: it is not here, or is too large.
    """
    if isinstance(spec, SweepSpec):
        return own_code(spec.of)
    if isinstance(spec, ChainSpec):
        return [code for step in spec.steps.values() for code in own_code(step)]
    code: list[CustomCode | None] = [*reader_code(spec)]
    if isinstance(spec, SelectSpec):
        code += [find_code(spec.scorer.import_)] if spec.scorer is not None else []
        code += [rule.code for rule in rules_of(spec)]
    if isinstance(spec, DistillSpec):
        from stillhouse.pipelines.image_inputs import named_code

        code += named_code(spec)
    if isinstance(spec, GenerateSpec):
        from stillhouse.pipelines.generate_inputs import own_code as generator_code

        code += generator_code(spec)
    if isinstance(spec, ClassifySpec):
        from stillhouse.pipelines.classify_data import classifier_code

        networks, own = classifier_code(spec)
        code += [*networks, own]
    if isinstance(spec, MixSpec) and spec.policy.name not in POLICIES:
        code.append(find_named("policy.name", spec.policy.name))
    if isinstance(spec, TrainSpec):
        code.append(own_objective(spec))
    return [one for one in code if one is not None]


def code_files(package: Path) -> dict[str, bytes]:
    """The sources of a package by path, relative to the folder that holds it.

    In a checkout `stillhouse/jobs`, `pipelines` and `actors` are links to the folders at the top;
    the files themselves are taken, as an installed package has them.
    """
    found: dict[str, bytes] = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for path in (Path(folder, name) for name in names):
            if path.suffix in _SUFFIXES and path.is_file():
                found[path.relative_to(package.parent).as_posix()] = path.read_bytes()
    return found


def check_size(files: dict[str, bytes]) -> None:
    """Refuse a package of more than `MAX_BYTES`."""
    size = sum(map(len, files.values()))
    if size > MAX_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise SpecError(
            f"{size:,} bytes would be sent to the cluster, {MAX_BYTES:,} are allowed: the largest "
            f"file is {largest} ({len(files[largest]):,} bytes); data belong into the store"
        )


def library_versions(root: Path) -> dict[str, str]:
    """By library that a cluster's image needs: the version in constraints.txt, else the one here.

    These are the dependencies of the package and of its extras ray, train and s3.
    """
    pinned: dict[str, str] = {}
    if (root / "constraints.txt").exists():
        text = (root / "constraints.txt").read_text()
        pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    found: dict[str, str] = {}
    for line in requires("stillhouse") or []:
        name = re.split(r"[^\w.-]", line)[0]
        extra = re.search(r"extra == .(\w+)", line)
        if extra is None or extra[1] in {"ray", "train", "s3"}:
            found[name] = pinned.get(name) or _installed(name)
    return found


def version_differences(tested: dict[str, str]) -> list[str]:
    """`torch 2.10.0 (tested with 2.13.0)` for each library that differs; builds do not count."""
    return [
        f"{name} {_installed(name)} (tested with {wanted})"
        for name, wanted in tested.items()
        if _installed(name).partition("+")[0] != wanted.partition("+")[0]
    ]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def warn_of_versions() -> None:
    """In a submitted job: name the libraries of the image that differ from the tested ones."""
    differing = version_differences(json.loads(Path(_VERSIONS_FILE).read_text()))
    if differing:
        print(f"warning: the cluster's image has {', '.join(differing)}", file=sys.stderr)
