"""What is installed: a wheel of what Dockerfile copies, and one by way of the source archive."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

ROOT = Path(__file__).parents[1]
LINKED = ("jobs", "pipelines", "actors")


def build(source, out):
    """The names in the wheel that pip builds from a folder, and the wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A folder with what Dockerfile copies before it installs."""
    folder = tmp_path_factory.mktemp("context")
    text = (ROOT / "Dockerfile").read_text().split("pip install -c")[0]
    for line in re.findall(r"^COPY --\S+ (.*)$", text, re.M):
        *names, _ = line.split()
        for name in names:
            hide = shutil.ignore_patterns("__pycache__")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=hide)
            else:
                shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(context, tmp_path_factory):
    """The wheel, and the names in it."""
    return build(context, tmp_path_factory.mktemp("wheel"))


def test_one_name_and_every_file(wheel):
    _, names = wheel
    assert {name.split("/")[0] for name in names} == {"stillhouse"}
    tops = {"stillhouse": ROOT / "stillhouse"}
    tops |= {f"stillhouse/{name}": ROOT / name for name in LINKED}
    wanted = {
        f"{top}/{path.relative_to(folder).as_posix()}"
        for top, folder in tops.items()
        for path in folder.rglob("*")  # does not go into the links
        if path.suffix in {".py", ".j2", ".css"}
    }
    assert names == wanted
    assert {"stillhouse/report/page.html.j2", "stillhouse/jobs/cli.py"} < names


def test_the_source_archive_makes_the_same_wheel(context, wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(context)
    archive = build_meta.build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / archive) as packed:
        assert not [one.name for one in packed if one.issym() or one.islnk()]
        packed.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert build(source, tmp_path / "out")[1] == wheel[1]


def test_it_works_outside_of_the_checkout(wheel, tmp_path):
    """In a bare environment, from a folder that has packages of those names itself."""
    made, _ = wheel
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    (packages,) = bare.glob("lib/python*/site-packages")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(packages)
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared))
    project = tmp_path / "project"
    for name in LINKED:
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f"raise RuntimeError('{name} of the user')")
    program = (
        "import stillhouse, stillhouse.jobs.cli, stillhouse.pipelines.select, stillhouse.actors\n"
        "from stillhouse.report.blocks import Result\n"
        "from stillhouse.report.page import render\n"
        "render(Result('select', 't', '2026-01-01T00:00:00Z', {'run': 'r'}, []))\n"
        "print(stillhouse.__file__)\n"
    )
    python = str(bare / "bin" / "python")
    hidden = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", program]
    done = subprocess.run(command, cwd=project, env=hidden, check=True, capture_output=True)
    assert Path(done.stdout.decode().strip()).is_relative_to(packages)
