"""With the base dependencies alone: readers work, and errors name the extra that is missing.

The environment is bare: its packages are links to those that the base dependencies need, found by
the metadata of what is installed here.
"""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from small import small_spec

ROOT = Path(__file__).parents[1]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names):
    """The distributions that these need, those included; extras and other platforms left out."""
    found, pending = {}, list(names)
    while pending:
        name = canonical(re.match(r"[\w.-]+", pending.pop())[0])
        if name in found or name == "colorama":
            continue
        found[name] = distribution(name)
        pending += [r for r in found[name].requires or [] if "extra ==" not in r]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of the bare environment."""
    bare = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    (packages,) = bare.glob("lib/python*/site-packages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for found in needed(project["dependencies"]).values():
        for top in {
            path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")
        }:
            link, target = packages / top, Path(found.locate_file(top))
            if not link.exists():
                link.symlink_to(target)
    (packages / "project.pth").write_text(str(ROOT))
    return str(bare / "bin" / "python")


def call(python, *arguments, **options):
    return subprocess.run([python, *arguments], capture_output=True, text=True, **options)


def verb(python, *arguments, **options):
    return call(python, "-c", "from stillhouse.jobs.cli import main; main()", *arguments, **options)


@pytest.mark.parametrize(
    "module", ["ray", "torch", "transformers", "datasets", "s3fs", "tokenizers"]
)
def test_they_are_not_there(python, module):
    assert "ModuleNotFoundError" in call(python, "-c", f"import {module}").stderr


def test_readers(python, finished):
    program = (
        "import sys, stillhouse\n"
        f"found = stillhouse.open_selection({finished['run']!r})\n"
        "print(found.num_rows, found.to_arrow().read_all().num_rows)\n"
        f"print(len(stillhouse.open_artifact({finished['artifacts']['tokens']!r}).parts))\n"
    )
    done = call(python, "-c", program)
    rows = finished["selection"]["num_sequences"]
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [str(rows)] * 2


def test_verbs_that_read_a_store(python, finished):
    done = verb(python, "status", finished["run"], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "done"


def test_a_run_names_the_extras(python, world, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(small_spec(world, store=str(tmp_path / "store"))))
    said = "pip install 'stillhouse[ray,train]'"
    done = verb(python, "run", str(spec))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    program = f"import stillhouse\nstillhouse.run({str(spec)!r})"
    assert f"MissingExtraError: ray, torch, transformers: not installed: {said}" in (
        call(python, "-c", program).stderr
    )


@pytest.mark.parametrize(
    ("uri", "extra"), [("s3://a/b", "s3"), ("gs://a/b", "gcs"), ("abfs://a/b", "azure")]
)
def test_a_store_names_the_extra(python, uri, extra):
    done = verb(python, "status", uri)
    assert done.returncode == 2 and f"pip install 'stillhouse[{extra}]'" in done.stderr
