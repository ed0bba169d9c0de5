"""`targets` of `job: select`: a selection of one pool for each, what they share made once."""

import pytest
import yaml
from small import LEARNING, MODEL, Quiet, make_world, rows, small_spec, write

from stillhouse.data_settings import reader_code
from stillhouse.errors import SpecError
from stillhouse.jobs.chain import Chain, run_spec
from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.run import run_job
from stillhouse.jobs.schema import schema
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.storage.run_record import read_json


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A spec of two targets."""
    folder = make_world(tmp_path_factory.mktemp("targets"), shards=2)
    write(folder / "law" / "law.parquet", rows(8, 120, ["law"], prefix="l"))
    single = small_spec(folder, publish="kept")
    sea = single.pop("target")
    law = {"path": str(folder / "law"), "heldout": 0.25}
    return single | {"targets": {"sea": sea, "law": law}}


@pytest.fixture(scope="module")
def made(ray_cluster, content):
    listener = Quiet()
    return run_spec(parse_spec(content, "spec"), listener), listener


def test_each_target_has_a_selection_and_the_rest_is_made_once(made):
    result, listener = made
    sea, law = (result["chain"]["steps"][name] for name in ("sea", "law"))
    assert [one["status"] for one in (sea, law)] == ["done", "done"]
    a, b = (read_json(one["run"], "result.json")["artifacts"] for one in (sea, law))
    for name in ("tokens", "tokenizer", "prior"):
        assert a[name] == b[name]
    assert a["scores"]["prior"] == b["scores"]["prior"]
    assert a["conditional"] != b["conditional"] and a["selection"] != b["selection"]
    assert (
        sea["selection"]["sources"]["sea"]["kept_tokens"]
        > (law["selection"]["sources"]["sea"]["kept_tokens"])
    )
    begun = {name: (total, reused) for name, total, reused in listener.steps}
    for step in ("train prior", "tokenizer"):
        assert begun[f"sea: {step}"] == (1, 0) and begun[f"law: {step}"] == (1, 1)
    parts, reused = begun["law: score prior"]
    fresh, before = begun["sea: score prior"]
    assert before == 0 and parts - reused < fresh  # the held-out target alone


def test_a_target_alone_is_the_same_run(made, content):
    single = {**content, "target": content["targets"]["law"], "publish": "kept-law"}
    del single["targets"]
    found = run_job(parse_spec(single, "spec"), Quiet())
    assert found["status"] == "nothing_to_do"
    assert found["run"] == made[0]["chain"]["steps"]["law"]["run"]
    assert found["published"]["name"] == "kept-law"


def test_again_there_is_nothing_to_do(made, content):
    assert plan_spec(parse_spec(content, "spec"))["status"] == "nothing_to_do"
    assert run_spec(parse_spec(content, "spec"), Quiet())["status"] == "nothing_to_do"


def test_selections_of_one_pool_come_behind_the_first(tmp_path):
    def select(pool, **more):
        return {
            "job": "select",
            "pool": {"path": pool},
            "target": {"path": "b"},
            "prior": {"model": MODEL, **LEARNING},
            "selection": {"tau": 2},
            **more,
        }

    steps = {"one": select("a"), "two": select("c"), "three": select("a"), "four": select("a")}
    chain = Chain(parse_spec({"job": "chain", "steps": steps}, "spec"))
    assert chain.behind == {"three": "one", "four": "one"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"path": "x"}}, "give either `target` or `targets`"),
        ({"targets": []}, "`targets`"),
        ({"targets": {"sea": {"paht": "x"}}}, "targets.sea: unknown key `target.paht`"),
        ({"targets": {"A B": {"path": "x"}}}, "A B"),
        ({"targets": {"A B": {"path": "x", "weight": 1}}}, "A B"),
        ({"sweep": {"over": {"selection.tau": [4, 8]}}}, "`sweep` beside `targets`"),
    ],
)
def test_mistakes_are_refused(content, changes, message):
    with pytest.raises(SpecError, match=message):
        parse_spec(content | changes, "spec")


def test_targets_of_a_step_are_steps(content):
    step = {key: one for key, one in content.items() if key != "store"}
    with pytest.raises(SpecError, match=r"`steps\.choose\.targets`: make each a step"):
        parse_spec({"job": "chain", "steps": {"choose": step}}, "spec")


def test_without_a_name_to_publish(content):
    chain = parse_spec(content | {"publish": None}, "spec")
    assert [step.publish for step in chain.steps.values()] == [None, None]


def test_weights_belong_to_the_content_of_their_targets(content, tmp_path):
    """The same files under each other's names, and weights, are another mixture."""
    sea, law = ({**one, "source": "target"} for one in content["targets"].values())
    runs = []
    for pair in ({"a": sea, "b": law}, {"b": sea, "a": law}):
        weights = {name: {**pair[name], "weight": w} for name, w in (("a", 3), ("b", 1))}
        targets = {name: weights[name] for name in pair}
        spec = {k: v for k, v in content.items() if k != "publish"} | {"targets": targets}
        runs.append(plan_spec(parse_spec(spec | {"store": str(tmp_path)}, "spec"))["run"])
    assert runs[0] != runs[1]


def test_a_reader_of_one_of_the_targets_is_sent_along(content, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class R:\n    suffixes = ('.x',)\n    def read(self, stream):\n        return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    target = content["targets"]["sea"] | {"weight": 1, "format": "mine:R"}
    spec = {k: v for k, v in content.items() if k != "publish"} | {"targets": {"a": target}}
    assert [code.name for code in reader_code(parse_spec(spec, "spec"))] == ["mine:R"]


def test_the_schema_knows_targets(content):
    from jsonschema import Draft202012Validator

    checker = Draft202012Validator(schema("select"))
    whole = yaml.safe_load(yaml.safe_dump(content))
    assert not [*checker.iter_errors(whole)]
    for wrong in (
        whole | {"target": {"path": "x"}},
        whole | {"targets": {}},
        whole | {"targets": {"sea": {"paht": "x"}}},
    ):
        assert [*checker.iter_errors(wrong)]


def weighted(content, sea, law):
    """One selection for a mixture of the two targets."""
    targets = {"sea": {**content["targets"]["sea"], "weight": sea}}
    targets["law"] = {**content["targets"]["law"], "weight": law}
    whole = content | {"targets": targets, "train": {"model": MODEL, **LEARNING}}
    return parse_spec({k: v for k, v in whole.items() if k != "publish"}, "spec")


@pytest.fixture(scope="module")
def mixed(made, content):
    """Of nine parts sea, one part law."""
    return run_job(weighted(content, 9, 1), Quiet())


def test_weights_make_one_selection_of_the_mixture(mixed, made, content):
    sea, law = (mixed["targets"][name] for name in ("sea", "law"))
    assert (sea["weight"], law["weight"]) == (9, 1)
    assert mixed["work"]["train prior"] == {"parts": 1, "reused": 1}
    manifest = read_json(mixed["artifacts"]["conditional"], "manifest.json")
    sets = manifest["inputs"]["data"]["sets"]
    assert [one["weight"] for one in sets] == [9, 1]
    drawn = manifest["totals"]["num_tokens"]
    assert drawn == pytest.approx(sea["num_tokens"] + law["num_tokens"], rel=0.1)
    kept = mixed["selection"]["sources"]
    assert kept["sea"]["kept_tokens"] > kept["law"]["kept_tokens"]


def test_the_held_out_text_of_a_mixture_is_that_of_all(mixed, made):
    heldout = read_json(mixed["artifacts"]["heldout_tokens"], "manifest.json")
    alone = [
        read_json(read_json(one["run"], "result.json")["artifacts"][name], "manifest.json")
        for one in made[0]["chain"]["steps"].values()
        for name in ("heldout_tokens",)
    ]
    parts = [part["sha256"] for one in alone for part in one["parts"]]
    assert [part["sha256"] for part in heldout["parts"]] == parts
    [label] = list(mixed["target"])
    assert label == "color" and mixed["target"]["color"]["heldout_nll"] > 0


def test_other_weights_are_another_selection(content, made):
    other = run_job(weighted(content, 1, 9), Quiet())
    kept = other["selection"]["sources"]
    assert kept["law"]["kept_tokens"] > kept["sea"]["kept_tokens"]
