"""What `submit` sends to a cluster: our own code, the spec, and the versions it was tested with."""

import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import stillhouse
from stillhouse.custom_code import CustomCode, find_named
from stillhouse.data_settings import reader_code
from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import SpecError
from stillhouse.mixing.policy import POLICIES
from stillhouse.mixing.spec import MixSpec
from stillhouse.pipelines.train_data import own_objective
from stillhouse.selection.own import find_code
from stillhouse.selection.rules import rules_of
from stillhouse.spec import JobSpec, SelectSpec
from stillhouse.training.spec import TrainSpec

PACKAGE = Path(stillhouse.__file__).parent
SPEC_FILE = "spec.yaml"
VERSIONS_FILE = "versions.json"
MAX_BYTES = 4_000_000
_SUFFIXES = {".py", ".j2", ".css"}
LIBRARIES = (
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "fsspec",
    "s3fs",
    "numpy",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
    "jinja2",
    "pillow",
    "requests",
)
"""What the image of a cluster has to have: the dependencies and the extras ray, train and s3."""


def write_package(path: Path, spec: JobSpec) -> int:
    """Write everything that the job needs into a zip; the same spec makes the same bytes.

    Ray would zip a folder as well, but without compressing it.

    Returns:
        Bytes of the zip.

    Raises:
        SpecError: more than `MAX_BYTES`, naming the largest file.
    """
    files = code_files(PACKAGE)
    for code in own_code(spec):  # found there as it is here: in the working directory
        files |= dict(code.files)
    files[SPEC_FILE] = spec.to_send().encode()
    files[VERSIONS_FILE] = json.dumps(pinned_versions(PACKAGE.parent), indent=1).encode()
    check_size(files)
    with ZipFile(path, "w") as archive:
        for name, data in sorted(files.items()):
            entry = ZipInfo(name)  # of 1980, whenever it is written
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, ZIP_DEFLATED)
    return path.stat().st_size


def own_code(spec: JobSpec) -> list[CustomCode]:
    """The code of readers, a scorer, networks, a policy or an objective of the user's.

    Raises:
        SpecError: it is not here, or is too much.
    """
    code: list[CustomCode | None] = [*reader_code(spec)]
    if isinstance(spec, SelectSpec):
        code += [find_code(spec.scorer.import_)] if spec.scorer is not None else []
        code += [rule.code for rule in rules_of(spec)]
    if isinstance(spec, DistillSpec):
        from stillhouse.pipelines.image_inputs import named_code

        code += named_code(spec)
    if isinstance(spec, MixSpec) and spec.policy.name not in POLICIES:
        code.append(find_named("policy.name", spec.policy.name))
    if isinstance(spec, TrainSpec):
        code.append(own_objective(spec))
    return [one for one in code if one is not None]


def requirements(spec: JobSpec) -> list[str]:
    """What that scorer needs beside the image."""
    return spec.scorer.pip if isinstance(spec, SelectSpec) and spec.scorer is not None else []


def code_files(package: Path) -> dict[str, bytes]:
    """The sources of one package, by path from the folder that holds it.

    In a checkout `stillhouse/jobs`, `pipelines` and `actors` are links to the folders at the top;
    what is sent has their files in place of the links, as an installed package has.
    """
    found: dict[str, bytes] = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for path in (Path(folder, name) for name in names):
            if path.suffix in _SUFFIXES and path.is_file():
                found[path.relative_to(package.parent).as_posix()] = path.read_bytes()
    return dict(sorted(found.items()))


def check_size(files: dict[str, bytes]) -> None:
    """Refuse what is no code any more."""
    size = sum(map(len, files.values()))
    if size > MAX_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise SpecError(
            f"{size:,} bytes would be sent to the cluster, {MAX_BYTES:,} are allowed: the largest "
            f"file is {largest} ({len(files[largest]):,} bytes); data belong into the store"
        )


def pinned_versions(root: Path) -> dict[str, str]:
    """By library: the version in constraints.txt, or the one here where there is no such file."""
    try:
        text = (root / "constraints.txt").read_text()
    except FileNotFoundError:
        return installed_versions()
    pinned = {name.lower(): v for name, v in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}
    return {name: pinned[name] for name in LIBRARIES if name in pinned}


def installed_versions() -> dict[str, str]:
    """By library: what is installed here."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def version_differences(tested: dict[str, str], installed: dict[str, str]) -> list[str]:
    """`torch 2.10.0 (tested with 2.13.0)` for each library that differs; builds do not count."""
    return [
        f"{name} {installed.get(name, 'missing')} (tested with {wanted})"
        for name, wanted in tested.items()
        if installed.get(name, "").partition("+")[0] != wanted.partition("+")[0]
    ]
