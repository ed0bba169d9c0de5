"""What is sent to a cluster."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from small import parse

from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import SpecError
from stillhouse.jobs.package import (
    LIBRARIES,
    MAX_BYTES,
    check_size,
    code_files,
    installed_versions,
    own_code,
    pinned_versions,
    version_differences,
    write_package,
)
from stillhouse.mixing.spec import MixSpec
from stillhouse.spec import SelectSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of the small spec, and what it holds once it is unpacked."""
    folder = tmp_path_factory.mktemp("package")
    archive = tmp_path_factory.mktemp("sent") / "job.zip"
    spec = parse(Path("/data"), compute={"address": "auto", "scorers": 3})
    size = write_package(archive, spec)
    assert size == archive.stat().st_size < 600_000
    shutil.unpack_archive(archive, folder)
    return folder, archive, spec


def test_it_holds_code_spec_and_versions_and_nothing_else(package):
    folder, _, spec = package
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {
        *(
            "stillhouse/jobs/entry.py",
            "stillhouse/pipelines/steps.py",
            "stillhouse/actors/scorer.py",
        ),
        *("stillhouse/report/style.css", "stillhouse/report/page.html.j2"),
    }
    tops = {name.split("/")[0] for name in files}
    assert tops == {"stillhouse", "spec.yaml", "versions.json"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    shipped = SelectSpec.model_validate(yaml.safe_load((folder / "spec.yaml").read_text()))
    assert shipped.compute.address is None
    assert shipped == spec.model_copy(update={"compute": shipped.compute})
    assert shipped.compute.scorers == 3


NET = """
import torch.nn as nn
from functools import partial

def make(num_channels, image_size, num_classes):
    return nn.Flatten()

small = partial(make)
"""


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The working directory, with a package of networks and a module of them."""
    (tmp_path / "h7_nets").mkdir()
    for file in ("h7_nets/wide.py", "h7_nets/blocks.py", "h7_flat.py", "other.py"):
        (tmp_path / file).write_text(NET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def distil(**changes):
    content = {"job": "distill", "store": "/s", "data": {"dataset": "digits"}, **changes}
    return DistillSpec.model_validate({"method": {"name": "mtt", "images_per_class": 1}} | content)


def factory(name):
    return {"name": "factory", "factory": name}


def test_networks_of_ones_own_are_sent(in_folder):
    asked = distil(
        network=factory("h7_nets.wide:make"),
        evaluate={"networks": [factory("h7_flat:small"), factory("h7_nets.wide:make")]},
    )
    write_package(in_folder / "job.zip", asked)
    shutil.unpack_archive(in_folder / "job.zip", in_folder / "sent")
    sent = {p.relative_to(in_folder / "sent").as_posix() for p in in_folder.glob("sent/**/*.py")}
    assert {path for path in sent if path.split("/")[0] != "stillhouse"} == {
        "h7_nets/wide.py",
        "h7_nets/blocks.py",
        "h7_flat.py",
    }
    teacher = {"name": "sre2l", "images_per_class": 1}
    taught = distil(method=teacher, teachers=[factory("h7_flat:nn")])
    assert [code.name for code in own_code(taught)] == ["h7_flat:nn"]
    before = [code.digest for code in own_code(asked)]
    (in_folder / "h7_flat.py").write_text(NET + "# changed")
    assert [code.digest for code in own_code(asked)] != before


def test_a_network_that_is_not_there_is_refused_before_it_is_sent(in_folder):
    with pytest.raises(SpecError, match=r"`factory: h7_none:make`: there is no module `h7_none`"):
        own_code(distil(network=factory("h7_none:make")))
    with pytest.raises(SpecError, match=r"`factory: h7_flat:wide`: the module has no `wide`"):
        own_code(distil(network=factory("h7_flat:wide")))
    assert own_code(distil(network=factory("torch.nn:Linear"))) == []  # is there anyhow


def test_the_same_spec_makes_the_same_bytes(package, tmp_path):
    _, archive, spec = package
    write_package(tmp_path / "again.zip", spec)
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_its_entry_runs_the_code_that_was_sent(package):
    """The folder's own modules; a spec with a mistake, so that no Ray starts."""
    folder, _, _ = package
    (folder / "stillhouse" / "jobs" / "__init__.py").write_text("print('sent')\n")
    before = (folder / "spec.yaml").read_text()
    (folder / "spec.yaml").write_text("job: select\nselect: 1\n")
    (folder / "versions.json").write_text('{"numpy": "1.0", "pyarrow": "0.1"}')
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.jobs.entry", "id-1"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    (folder / "spec.yaml").write_text(before)
    assert (done.returncode, done.stdout) == (2, "sent\n")
    assert "unknown key `select`" in done.stderr
    versions = installed_versions()
    assert (
        f"warning: the cluster's image has numpy {versions['numpy']} (tested with 1.0), "
        f"pyarrow {versions['pyarrow']} (tested with 0.1)"
    ) in done.stderr


def test_libraries_are_the_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["ray"], *extras["train"], *extras["s3"]]
    names = [line.partition("[")[0].partition(">")[0].partition("=")[0] for line in wanted]
    assert set(LIBRARIES) == set(names)
    assert set(pinned_versions(ROOT)) == set(LIBRARIES)


def test_without_constraints_what_is_here_counts(tmp_path):
    assert pinned_versions(tmp_path) == installed_versions()


def test_differences_are_named():
    tested = {"torch": "2.13.0", "numpy": "2.4.6", "ray": "2.60.0"}
    assert (
        version_differences(tested, {"torch": "2.13.0+cpu", "numpy": "2.4.6", "ray": "2.60.0"})
        == []
    )
    assert version_differences(tested, {"torch": "2.12.0+cu130", "numpy": "2.4.6"}) == [
        "torch 2.12.0+cu130 (tested with 2.13.0)",
        "ray missing (tested with 2.60.0)",
    ]


def test_data_are_not_sent(tmp_path):
    """Only sources are taken; where these are large all the same, the largest is named."""
    (tmp_path / "jobs" / "__pycache__").mkdir(parents=True)
    for name in ("a.py", "data.parquet", "__pycache__/a.pyc", ".venv"):
        (tmp_path / "jobs" / name).write_bytes(b"x")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "jobs").symlink_to("../jobs")
    assert code_files(tmp_path / "package") == {"package/jobs/a.py": b"x"}
    check_size({"a": b"x" * MAX_BYTES})
    with pytest.raises(SpecError, match=r"4,000,001 bytes .* file is jobs/b.py .4,000,000 bytes"):
        check_size({"jobs/a.py": b"x", "jobs/b.py": b"x" * MAX_BYTES})


@pytest.mark.parametrize(
    ("policy", "files"),
    [("exp3", []), ("uniform", []), ("greedy_policy:Greedy", ["greedy_policy.py"])],
)
def test_a_policy_of_ours_is_not_sent_apart(monkeypatch, policy, files):
    monkeypatch.chdir(ROOT / "examples" / "extend")
    arm = {"path": "arms.parquet", "by": "task"}
    target = {"path": "target.parquet", "num_shots": 16}
    spec = MixSpec.model_validate(
        {"job": "mix", "target": target, "auxiliary": [arm], "policy": {"name": policy}}
    )
    assert [path for code in own_code(spec) for path, _ in code.files] == files
