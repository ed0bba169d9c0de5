"""Specs of `job: distill`: which are accepted, and why others are refused."""

import pytest
import yaml

from stillhouse.errors import SpecError
from stillhouse.jobs.paths import identity_of, with_absolute_paths
from stillhouse.jobs.spec_file import load_spec

CONTRACT = """
job: distill
store: ./store
data:     {path: data/fashion-mnist}
network:  {name: convnet, depth: 3, width: 32, norm: instance}
experts:  {count: 10, epochs: 15}
method:   {name: ast, images_per_class: 10}
evaluate: {networks: [{name: convnet, depth: 3, width: 32}], seeds: 3}
controls: [random_real, full]
compute:  {experts: 2, distillers: 1, gpus_per_worker: 0}
"""
TEACHER = {"name": "convnet", "depth": 3, "width": 32, "norm": "batch"}


def method(name, images_per_class=1, **settings):
    return {"name": name, "images_per_class": images_per_class, **settings}


def load(tmp_path, *drop, **changes):
    content = yaml.safe_load(CONTRACT) | changes
    for key in drop:
        content.pop(key, None)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_spec(str(path), [])


def test_contract_is_accepted(tmp_path):
    spec = load(tmp_path)
    assert type(spec).model_validate(yaml.safe_load(spec.to_yaml())).to_yaml() == spec.to_yaml()
    assert spec.matching
    assert spec.method.window_end(spec.experts.epochs) == 14
    assert spec.method.student_momentum == 0.9
    assert spec.networks[0].label == "convnet-3, width 32"


def test_all_methods(tmp_path):
    for name in ("mtt", "tesla", "ftd", "datm", "ast"):
        assert load(tmp_path, method=method(name)).matching
    for name in ("sre2l", "infer", "rded", "nrr_dd"):
        assert not load(tmp_path, "experts", method=method(name, 10), teachers=[TEACHER]).matching


def test_a_recipe_given_in_part_keeps_the_rest_of_its_own_default(tmp_path):
    given = {"epochs": 5, "views": {"flip": False}}
    evaluate = {"full": {"epochs": 7}}
    changes = {
        "method": method("rded"),
        "teachers": [TEACHER],
        "squeeze": given,
        "evaluate": evaluate,
    }
    spec = load(tmp_path, "experts", **changes)
    assert (spec.squeeze.optimiser, spec.squeeze.epochs) == ("sgd", 5)
    assert (spec.squeeze.views.mix, spec.squeeze.views.flip) == ("none", False)
    assert (spec.evaluate.full.epochs, spec.evaluate.full.batch_size) == (7, 128)
    assert spec.evaluate.full.views.mix == "none"


def test_different_networks_have_different_labels(tmp_path):
    factory = {"name": "factory", "factory": "nets:make"}
    networks = [factory, factory | {"options": {"hidden": 8}}, {"norm": "none"}, {}]
    found = load(tmp_path, evaluate={"networks": networks}).networks
    assert [network.label for network in found] == [
        "nets:make",
        "nets:make, hidden 8",
        "convnet-3, no norm",
        "convnet-3",
    ]


def test_without_flips_no_network_sees_any(tmp_path):
    changes = {"method": method("rded"), "teachers": [TEACHER]}
    assert load(tmp_path, "experts", **changes).teacher_recipe.views.flip
    digits = {"augmentation": ["crop"]}
    spec = load(tmp_path, "experts", preprocessing=digits, **changes)
    assert spec.squeeze.views.flip and not spec.teacher_recipe.views.flip


MTT_ENDS = "a start at epoch 14 and 2 epochs more lead beyond the experts' 15"
NO_STATISTICS = "`teachers.0` has no batch statistics to match: give it `norm: batch`"
RESNETS = {"network": {"name": "resnet18"}, "compute": {"distillers": 2}}
DATM_STARTS = "`method.first_max_start_epoch: 30` has to lie above `min_start_epoch` (0)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "ast"}}, "`method.images_per_class` is missing"),
        ({"method": method("atm")}, "`atm` is none of mtt"),
        ({"method": method("mtt", balanced=True)}, "unknown key `method.balanced`"),
        ({"method": method("mtt", max_start_epoch=15)}, MTT_ENDS),
        ({"method": method("mtt", min_start_epoch=14)}, "no start epoch lies in [14, 14)"),
        ({"method": method("ast", num_steps=1)}, "there is no step for each epoch's match"),
        ({"method": method("datm", first_max_start_epoch=30)}, DATM_STARTS),
        ({"teachers": [TEACHER]}, "`method: ast` matches trajectories"),
        ({"squeeze": {"epochs": 5}}, "`squeeze` trains `teachers`, `method: ast` has none"),
        ({"data": {}}, "give either `path` or `dataset`"),
        ({"network": {"name": "factory"}}, "`factory` goes with `name: factory`"),
        ({"network": {"name": "resnet18", "depth": 5}}, "`depth` does nothing for"),
        ({"network": {"name": "convnet", "options": {"a": 1}}}, "`options` does nothing for"),
        (RESNETS, "`compute.distillers` above 1 splits batches"),
        ({"evaluate": {"protocol": "p4"}}, "`evaluate.protocol`"),
        ({"controls": ["random"]}, "`controls.0`"),
    ],
)
def test_specs_that_are_refused(tmp_path, changes, message):
    with pytest.raises(SpecError) as error:
        load(tmp_path, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "teachers", "message"),
    [
        ("rded", None, "`method: rded` needs `teachers`"),
        ("rded", [TEACHER | {"norm": "instance"}], NO_STATISTICS),
        ("infer", [TEACHER], "at least 2 are needed"),
    ],
)
def test_teachers_that_are_refused(tmp_path, name, teachers, message):
    changes = {"teachers": teachers} if teachers else {}
    with pytest.raises(SpecError) as error:
        load(tmp_path, "experts", method=method(name), **changes)
    assert message in str(error.value)


def test_paths_and_widths_are_no_identity(tmp_path):
    (tmp_path / "a").mkdir()
    one = load(tmp_path, data={"path": str(tmp_path / "a"), "test": str(tmp_path / "b")})
    two = load(tmp_path, data={"path": "s3://b/a", "test": "s3://b/b"}, compute={"experts": 7})
    assert identity_of(one) == identity_of(two)
    moved = with_absolute_paths(load(tmp_path, data={"path": "./a", "test": "./b"}))
    assert moved.data.path.startswith("/")
    assert moved.data.test.startswith("/")
