"""The JSON Schema of specs, by the jsonschema library: what `plan` takes, it takes."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from stillhouse.errors import SpecError
from stillhouse.jobs.schema import schema
from stillhouse.jobs.spec_file import parse_spec

ROOT = Path(__file__).parents[2]


class Yaml12(yaml.SafeLoader):
    """As editors read YAML: `1e-3` is a number (to PyYAML it is text, which pydantic takes)."""


FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789"))
FENCED = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documented():
    """Every whole spec of the examples and the documentation, by where it stands."""
    texts = {str(p.relative_to(ROOT)): [p.read_text()] for p in ROOT.glob("examples/*.yaml")}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        texts[str(page.relative_to(ROOT))] = FENCED.findall(page.read_text())
    found = {}
    for place, blocks in texts.items():
        for number, text in enumerate(blocks):
            try:
                content = yaml.load(text, Yaml12)
                parse_spec(content, place)
            except (yaml.YAMLError, SpecError, TypeError):
                continue  # a part of a spec, or with `...` in it
            if isinstance(content, dict) and "job" in content:
                found[f"{place}-{number}"] = content
    return found


SPECS = documented()


@pytest.fixture(scope="module")
def checker():
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def test_there_are_specs_of_every_job():
    assert {spec["job"] for spec in SPECS.values()} >= {"select", "train", "mix", "distill"}
    assert any("sweep" in spec for spec in SPECS.values())


@pytest.mark.parametrize("place", SPECS)
def test_documented_specs_are_valid(checker, place):
    problems = [f"{e.json_path}: {e.message}" for e in checker.iter_errors(SPECS[place])]
    assert problems == []


SELECT = {
    "job": "select",
    "pool": {"path": "a"},
    "target": {"path": "b"},
    "prior": {"model": {"hidden_size": 64, "num_layers": 2}},
    "selection": {"tau": 8},
}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"selection": {"tua": 8}}, "$.selection"),
        ({"sequence_length": "long"}, "$.sequence_length"),
        ({"pool": {}}, "$.pool"),
        ({"pol": {"path": "a"}}, "$"),
        ({"job": "slect"}, "$.job"),
        ({"sweep": {"over": {"selection.tau": [4, 8]}}}, "$.sweep"),  # no metric
    ],
)
def test_mistakes_have_their_place(checker, changes, path):
    assert [*checker.iter_errors(SELECT)] == []
    assert path in {error.json_path for error in checker.iter_errors(SELECT | changes)}


def test_the_task_chooses_the_settings_of_a_training(checker):
    spec = {"job": "train", "task": "classify", "data": {"path": "a"}, "network": {"name": "vit"}}
    problems = {error.json_path for error in checker.iter_errors(spec)}
    text = {error.json_path for error in checker.iter_errors({**spec, "task": "language"})}
    assert "$" not in problems and "$" in text  # `network` is none of a language model's keys


def test_steps_of_a_chain_are_specs(checker):
    step = {"selection": {"tau": 8, "tua": 8}}
    chain = {"job": "chain", "steps": {"choose": SELECT | step}}
    assert [e.json_path for e in checker.iter_errors(chain)] == ["$.steps.choose.selection"]
    chain["steps"] = {"choose": SELECT}
    assert [*checker.iter_errors(chain)] == []


def test_of_one_job(reports):
    code, made = reports("schema", "mix")
    checker = jsonschema.Draft202012Validator(made)
    assert code == 0
    assert [e.json_path for e in checker.iter_errors({"job": "select"})] == ["$.job"]
    code, found = reports("schema", "sort")
    assert code == 2 and "select" in found["error"]
    assert json.dumps(made)
