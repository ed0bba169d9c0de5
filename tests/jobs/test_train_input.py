"""What a train job refuses before any work, and what it knows of its data. No Ray."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small import Quiet, rows, write

from stillhouse.errors import ClusterError, InputError, ModelError, SpecError, StillhouseError
from stillhouse.jobs.plan import plan_job
from stillhouse.jobs.run import list_job, run_job, run_name
from stillhouse.jobs.spec_file import load_spec, parse_spec
from stillhouse.storage.artifact import Store
from stillhouse.storage.commit import check_store
from stillhouse.training.data_spec import FileData
from stillhouse.training.schedule import Schedule, Share
from stillhouse.training.spec import TrainSpec

LENGTH = 16


def write_tokens(path, count):
    """`count` sequences of 16 ids below 200."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(count).integers(0, 200, (count, LENGTH), np.uint16)
    flat = pa.array(ids.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, LENGTH)
    pq.write_table(pa.table({"input_ids": lists}), path)


@pytest.fixture
def place(tmp_path, untrained):
    write_tokens(tmp_path / "tokens" / "a.parquet", 40)
    write_tokens(tmp_path / "tokens" / "b.parquet", 24)
    write(tmp_path / "text" / "sea.parquet", rows(7, 20, ["sea"]))
    shutil.copytree(untrained["tokenizer"]["path"], tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def content(place):
    """A spec of a training on token files."""
    return {
        "job": "train",
        "store": str(place / "store"),
        "data": {"path": str(place / "tokens")},
        "tokenizer": str(place / "tokenizer"),
        "model": {"hidden_size": 32, "num_layers": 1},
        "train": {"num_tokens": 2048, "global_batch": 8},
        "compute": {"trainers": 2},
    }


def opened(content):
    spec = TrainSpec.model_validate(content)
    store = Store(check_store(spec.store))
    return list_job(spec).open(store, remember=True)


def load(place, content, *sets):
    (place / "spec.yaml").write_text(yaml.safe_dump(content))
    return load_spec(str(place / "spec.yaml"), list(sets))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["data={}"], r"`data.path` is missing"),
        (["data={selection: a, wieght: 2}"], r"`data.wieght` \(did you mean `weight`"),
        (["data=[]"], "`data`: give at least one data set"),
        (["data={path: x, weight: 0}"], "`data.weight`: 0: input should be greater"),
        (["data={path: x, weight: -1}"], "`data.weight`: -1: input should be greater"),
        (["data={path: x, max_epochs: 0}"], "`data.max_epochs`: 0: input should be greater than 0"),
        (["data={path: x, when_exhausted: reweight}"], "`when_exhausted: reweight` needs `max_e"),
        (
            ["data={path: x, weight: {schedule: [{at: 0, weight: 1}]}}"],
            "`data.weight`: one data set",
        ),
        (["heldout={path: x, max_epochs: 1}"], "`heldout.max_epochs`: held-out data are not"),
        (
            ["heldout={path: x, weight: {schedule: [{at: 0, weight: 1}]}}"],
            "`heldout.weight`: held-",
        ),
        (
            [
                "data={path: x, max_epochs: 2}",
                "train.select=online",
                "online={prior: {path: a}, conditional: {path: a}, tau: 2}",
            ],
            "`data.max_epochs`: `train.select: online` sees all candidates",
        ),
        (["train.lanes=3"], "`train.lanes` 3 does not divide `train.global_batch` 8"),
        (["job=trian"], "did you mean `train`"),
        (["compute.min_trainers=3"], "`compute.min_trainers` 3 is above `compute.tr"),
        (
            ["train.sharding=fsdp", "compute={trainers: 2, gpus_per_worker: 0.5}"],
            "`train.sharding: fsdp` needs a whole GPU a worker, not 0.5",
        ),
        (["train.sharding=ddp"], "`train.sharding`: 'ddp': input should be 'none' or"),
    ],
)
def test_a_bad_spec_is_refused(place, content, sets, message):
    with pytest.raises(SpecError, match=message):
        load(place, content, *sets)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["{between: linear}", 1], r"`data.0.weight.schedule` is missing"),
        (["{schedule: []}", 1], r"`data.0.weight.schedule`: \[\]: list should have at least 1"),
        (
            ["{schedule: [{at: 0.1, weight: 1}]}", 1],
            "`data.0.weight`: the first `at` is 0.1: a sch",
        ),
        (
            ["{schedule: [{at: 0, weight: 1}, {at: 0.5, weight: 2}, {at: 0.5, weight: 3}]}", 1],
            r"`data.0.weight`: `at` has to rise from point to point, not \[0.0, 0.5, 0.5\]",
        ),
        (["{schedule: [{at: 2, weight: 1}]}", 1], "`data.0.weight.schedule.0.at`: 2: input should"),
        (["{schedule: [{at: 0, weight: -1}]}", 1], "`data.0.weight.schedule.0.weight`: -1: input"),
        (
            ["{schedule: [{at: 0, wieght: 1}]}", 1],
            r"schedule.0.wieght` \(did you mean `weight`\?\)",
        ),
        (
            ["{schedule: [{at: 0, weight: 0}]}", 1],
            "`data.0.weight`: every weight is 0: leave the d",
        ),
        (
            ["{schedule: [{at: 0, weight: 1}], betwen: linear}", 1],
            r"`data.0.weight.betwen` \(did yo",
        ),
        (
            ["{schedule: [{at: 0, weight: 1}], between: cubic}", 1],
            "`data.0.weight.between`: 'cubic'",
        ),
        (
            [
                "{schedule: [{at: 0, weight: 1}, {at: 0.5, weight: 0}], between: linear}",
                "{schedule: [{at: 0, weight: 0}, {at: 0.5, weight: 0}, {at: 1, weight: 1}]}",
            ],
            "`data`: the weights of all data sets are 0 at 0.5",
        ),
    ],
)
def test_bad_weights_are_refused(place, content, weights, message):
    data = ", ".join(f"{{path: x, weight: {weight}}}" for weight in weights)
    with pytest.raises(SpecError, match=message):
        load(place, content, f"data=[{data}]")


def test_weights_that_change_in_a_spec(place, content):
    given = "{schedule: [{at: 0, weight: 3}, {at: 0.8, weight: 0}], between: linear}"
    data = f"data=[{{path: x, weight: {given}, max_epochs: 2}}, {{path: y, weight: 2}}]"
    spec = load(place, content, data)
    first, second = (one.share for one in spec.datasets)
    assert first == Share(Schedule(((0.0, 3.0), (0.8, 0.0)), linear=True), 2.0)
    assert second == Share(2.0)
    assert TrainSpec.model_validate(yaml.safe_load(spec.to_yaml())) == spec
    step = yaml.safe_load(spec.to_send())
    chain = {"job": "chain", "store": step.pop("store"), "steps": {"all": step}}
    chain = parse_spec(yaml.safe_load(parse_spec(chain, "a").to_send()), "b")
    assert [one.share for one in chain.steps["all"].datasets] == [first, second]
    # a run is named as before by a spec that has neither limits nor schedules
    assert spec.model_dump()["data"][1].keys() == {*FileData.model_fields} - {
        "max_epochs",
        "when_exhausted",
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compute": {"trainers": 3}}, SpecError, r"`compute.trainers` 3 does not divide .* 8 "),
        ({"data": {"path": "nowhere/*.parquet"}}, InputError, "no files match"),
        ({"data": {"selection": "nowhere/selections/x"}}, StillhouseError, "no artifact at"),
        ({"tokenizer": "./nowhere"}, ModelError, "tokenizer './nowhere': no such file or folder"),
        ({"tokenizer": None}, SpecError, "`tokenizer` is missing: the data do not tell"),
        ({"sequence_length": 32}, InputError, "`data` has sequences of 16 tokens, `sequence_leng"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(content, changes, error, message):
    with pytest.raises(error, match=message):
        opened(content | changes)


FLOATS = pa.array([[1.0] * LENGTH] * 8, pa.list_(pa.float32(), LENGTH))
INTS = pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (FLOATS, "`input_ids` is .*float.*, not lists of integers"),
        (pa.array([[1] * 16, [2] * 3], INTS), r"sequences of 3 to 16 tokens: pack them to one T"),
        (pa.array([], INTS), r"a\.parquet has no rows: remove it"),
        (pa.array([[1] * LENGTH, None], INTS), r"a\.parquet: 1 rows have no `input_ids`"),
    ],
)
def test_token_files_that_cannot_be_used(place, content, ids, message):
    pq.write_table(pa.table({"input_ids": ids}), place / "tokens" / "a.parquet")
    with pytest.raises(InputError, match=message):
        opened(content)


@pytest.mark.parametrize("kind", [pa.large_list(pa.int64()), pa.list_(pa.int32())])
def test_lists_of_other_types(place, content, kind):
    """As polars and pandas write them."""
    for name in ("a", "b"):
        path = place / "tokens" / f"{name}.parquet"
        pq.write_table(pa.table({"input_ids": pa.array([[1] * LENGTH] * 8, kind)}), path)
    assert opened(content).inputs.sequence_length == LENGTH


def test_a_context_shorter_than_the_sequences(content):
    """Found by the dry walk of `plan`, once the tokenizer is in the store."""
    from stillhouse.pipelines.context import Context
    from stillhouse.pipelines.tokenizer import given_tokenizer

    model = {"hidden_size": 32, "num_layers": 1, "max_position": 8}
    spec = TrainSpec.model_validate(content | {"model": model})
    ctx = Context(Store(check_store(spec.store)), spec.compute, Quiet())
    given_tokenizer(ctx, spec.tokenizer.path, None, "auto")
    with pytest.raises(ModelError, match=r"`model.max_position` 8 is below `sequence_length` 16"):
        plan_job(spec)


def test_a_cluster_that_is_too_small_is_named_after_a_while(content, ray_cluster):
    compute = {"trainers": 8, "wait_s": 0}
    with pytest.raises(ClusterError, match="training 'target' needs 8 CPUs for 8 workers, the cl"):
        run_job(TrainSpec.model_validate(content | {"compute": compute}), Quiet())


def test_files_of_tokens_are_known_by_content(place, content):
    inputs = opened(content).inputs
    (tokens,) = inputs.datasets
    assert (tokens.rows, tokens.sequence_length) == ((40, 24), LENGTH)
    before = run_name(TrainSpec.model_validate(content), opened(content).identity())
    shutil.move(place / "tokens", place / "moved")
    moved = content | {"data": {"path": str(place / "moved")}}
    assert run_name(TrainSpec.model_validate(moved), opened(moved).identity()) == before
    write_tokens(place / "moved" / "b.parquet", 25)
    assert run_name(TrainSpec.model_validate(moved), opened(moved).identity()) != before


def test_a_mixture_of_tokens_documents_and_a_held_out(place, content):
    data = [
        {"path": str(place / "tokens"), "weight": 3},
        {"path": str(place / "text"), "source": "ships"},
    ]
    held = {"path": str(place / "tokens" / "b.parquet")}
    inputs = opened(content | {"data": data, "heldout": held}).inputs
    found = [
        (type(one).__name__, key, one.name, one.share.weight) for key, one in inputs.sets.items()
    ]
    assert found == [
        ("TokenSet", "data.0", "tokens", 3.0),
        ("TextSet", "data.1", "ships", 1.0),
        ("TokenSet", "heldout", "b", 1.0),
    ]
    assert inputs.sequence_length == LENGTH


def test_a_selection_brings_its_tokenizer(finished, untrained, tmp_path, content):
    for uri in (finished["run"], finished["artifacts"]["selection"]):
        changes = {"data": {"selection": uri}, "tokenizer": None, "store": str(tmp_path / "other")}
        inputs = opened(content | changes).inputs
        (tokens,) = inputs.datasets
        assert tokens.num_rows == finished["selection"]["num_sequences"]
        assert inputs.tokenizer.folder == finished["artifacts"]["tokenizer"]
    tokens = content | {"data": {"path": finished["artifacts"]["tokens"]}, "tokenizer": None}
    assert opened(tokens).inputs.tokenizer.folder == finished["artifacts"]["tokenizer"]
    other = changes | {"tokenizer": untrained["tokenizer"]["path"]}
    with pytest.raises(ModelError, match="`data` was made with the tokenizer"):
        opened(content | other)


def test_a_plan_says_what_it_costs(content, place):
    planned = plan_job(TrainSpec.model_validate(content))
    assert planned["status"] == "to_do"
    assert planned["steps"]["train"]["tokens"] == 2048
    assert planned["steps"]["train"]["flops"] > 0
    assert planned["steps"]["train"]["seconds"] is None  # no run of this store tells
    assert not (place / "store").exists()
    json.dumps(planned, allow_nan=False)
