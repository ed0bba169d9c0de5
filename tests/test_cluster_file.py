"""cluster.yaml against what it will be read by: Ray's own checks, EC2's parameters, `ray start`."""

import shlex
import subprocess
from pathlib import Path

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prepared():
    """The file as `ray up` fills it in and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_ray_accepts_it_and_refuses_a_mistake(prepared):
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepared | {"max_worker": 1})


def test_groups(prepared):
    groups = prepared["available_node_types"]
    assert prepared["head_node_type"] == "head"
    assert groups["head"]["resources"] == {"CPU": 0}
    workers = {name: group for name, group in groups.items() if name != "head"}
    assert {name for name, group in workers.items() if group["resources"].get("GPU")} == {
        "gpu",
        "gpu_on_demand",
    }
    assert all(group["min_workers"] == 0 for group in workers.values())
    assert sum(group["max_workers"] for group in workers.values()) >= prepared["max_workers"]
    spot = {n for n, g in workers.items() if "InstanceMarketOptions" in g["node_config"]}
    assert spot == {"cpu", "gpu"}
    assert {n for n, g in workers.items() if g["labels"]["market"] == "spot"} == spot


def test_labels_in_the_documentation_are_those_of_nodes(prepared):
    text = (ROOT / "docs" / "cluster.md").read_text()
    compute = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["compute"]
    asked = {name: compute[name]["labels"] for name in ("scorer", "trainer")}
    for labels in asked.values():
        fitting = [
            name
            for name, group in prepared["available_node_types"].items()
            if group["resources"].get("GPU") and labels.items() <= group.get("labels", {}).items()
        ]
        assert fitting, labels
    assert len(asked) == 2


def test_ec2_would_take_the_nodes(prepared):
    """The parameters of each instance, against the model that boto3 itself checks them with."""
    shape = (
        botocore.session.get_session()
        .get_service_model("ec2")
        .operation_model("RunInstances")
        .input_shape
    )
    for group in prepared["available_node_types"].values():
        wanted = group["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(wanted, shape)
        assert not report.has_errors(), report.generate_report()
        assert set(group["node_config"]["IamInstanceProfile"]) == {"Name"}
    assert ParamValidator().validate({"MinCount": 1, "Typo": 1}, shape).has_errors()


def test_commands_are_ray_commands(prepared):
    from ray.scripts.scripts import cli

    for command in prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("--")]
        assert words[0] == "ray"
        verb = cli.commands[words[1]]
        verb.make_context(words[1], words[2:])  # refuses an unknown option


def test_nothing_is_open_and_nothing_secret(prepared):
    head = prepared["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    starts = [prepared[f"{node}_start_ray_commands"][-1] for node in ("head", "worker")]
    assert all(command.startswith("RAY_AUTH_MODE=token ray start") for command in starts)
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    text = (ROOT / "cluster.yaml").read_text().lower()
    assert "aws_secret" not in text and "aws_access_key" not in text
