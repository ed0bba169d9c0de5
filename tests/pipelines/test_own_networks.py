"""Results are named by the code of the user's own networks."""

import pytest

from stillhouse.distillation.spec import DistillSpec
from stillhouse.errors import SpecError
from stillhouse.pipelines.image_inputs import open_images
from stillhouse.storage.artifact import Store


def spec(factory):
    network = {"name": "factory", "factory": factory}
    return DistillSpec.model_validate(
        {
            "job": "distill",
            "store": "/nowhere",
            "data": {"dataset": "digits"},
            "network": network,
            "method": {"name": "mtt", "images_per_class": 1},
        }
    )


def opened(tmp_path, factory):
    return open_images(Store(str(tmp_path / "store")), spec(factory), [], remember=False)


def test_a_changed_network_is_another_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h9_nets.py").write_text("def make(**_):\n    return 1\n")
    first, again = opened(tmp_path, "h9_nets:make"), opened(tmp_path, "h9_nets:make")
    assert first == again and len(first.given.code) == 1
    (tmp_path / "h9_nets.py").write_text("def make(**_):\n    return 2\n")
    changed = opened(tmp_path, "h9_nets:make")
    assert changed.given.images == first.given.images
    assert changed.identity() != first.identity()


def test_what_is_installed_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for factory in ("sklearn.linear_model:Ridge", "torch.nn:Linear"):
        assert opened(tmp_path, factory).given.code == ()
    with pytest.raises(SpecError, match="there is no module `h9_none` here"):
        opened(tmp_path, "h9_none:make")
