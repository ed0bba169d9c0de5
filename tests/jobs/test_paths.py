import pytest

from stillhouse.errors import SpecError
from stillhouse.jobs.paths import refuse_local_paths, with_absolute_paths
from stillhouse.spec import SelectSpec

REMOTE = {
    "job": "select",
    "store": "s3://b/store",
    "pool": {"path": "s3://b/pool"},
    "target": {"path": "s3://b/target"},
    "selection": {"tau": 8},
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"store": "./store"}, "`store: ./store`"),
        ({"pool": {"path": ["s3://b/a", "/data/*"]}}, "`pool.path: /data/[*]`"),
        ({"target": {"path": "~/books"}}, "`target.path: ~/books`"),
        (
            {"target": {"path": "s3://b/t", "heldout": {"path": "held"}}},
            "`target.heldout.path: held`",
        ),
        ({"tokenizer": "./tokenizer.json"}, "`tokenizer.path: ./tokenizer.json`"),
        ({"prior": {"path": "/models/p"}}, "`prior.path: /models/p`"),
        ({"conditional": {"path": "~/c"}}, "`conditional.path: ~/c`"),
        ({"exclude": {"ids": ["s3://b/ids.txt", "ids.txt"]}}, "`exclude.ids: ids.txt`"),
        ({"decontaminate": ["s3://b/a", "b.jsonl"]}, "`decontaminate.1.path: b.jsonl`"),
        ({"selection": {"threshold_from": "store/selections/x"}}, "`selection.threshold_from: "),
    ],
)
def test_local_paths_are_named(changes, named):
    spec = SelectSpec.model_validate(REMOTE | changes)
    with pytest.raises(SpecError, match=f"the cluster cannot read local paths: {named}"):
        refuse_local_paths(spec, "the cluster")


def test_a_folder_that_looks_like_a_hub_name(tmp_path, monkeypatch):
    spec = SelectSpec.model_validate(REMOTE | {"prior": {"path": "owner/model"}})
    monkeypatch.chdir(tmp_path)
    refuse_local_paths(spec, "it")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    with pytest.raises(SpecError, match=r"prior\.path: owner/model"):
        refuse_local_paths(spec, "it")


def test_absolute_paths_are_the_same_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = SelectSpec.model_validate(
        REMOTE
        | {
            "store": "store",
            "pool": {"path": ["pool/*", "s3://b/pool"]},
            "target": {"path": "t", "heldout": {"path": "h"}},
            "tokenizer": "owner/name",
            "selection": {"threshold_from": "0" * 64},
        }
    )
    found = with_absolute_paths(spec)
    assert found.store == str(tmp_path / "store")
    assert found.pool.paths == [str(tmp_path / "pool" / "*"), "s3://b/pool"]
    assert found.target.paths == [str(tmp_path / "t")]
    assert found.target.heldout.paths == [str(tmp_path / "h")]
    assert found.tokenizer.path == "owner/name"
    assert found.selection == spec.selection
    again = with_absolute_paths(found)
    assert again == found
