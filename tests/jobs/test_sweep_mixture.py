"""`sweep.mixture` on real trainings: one of two sources is what the held-out text is made of."""

import json
from pathlib import Path

import pytest
import yaml
from small import LEARNING, MODEL, Quiet, rows, write
from typer.testing import CliRunner

from stillhouse.errors import SpecError
from stillhouse.jobs.chain import run_spec
from stillhouse.jobs.chain_plan import plan_spec
from stillhouse.jobs.cli import app
from stillhouse.jobs.run import run_job
from stillhouse.jobs.spec_file import parse_spec
from stillhouse.jobs.verify import verify
from stillhouse.report.page import read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three times as much law as sea; sea is held out."""
    folder = tmp_path_factory.mktemp("mixture")
    write(folder / "law.parquet", rows(1, 150, ["law"]))
    write(folder / "sea.parquet", rows(2, 50, ["sea"]))
    write(folder / "heldout.parquet", rows(3, 30, ["sea"]))
    return folder


def content_of(folder, **changes):
    content = {
        "job": "train",
        "store": str(folder / "store"),
        "data": [{"path": str(folder / f"{name}.parquet")} for name in ("law", "sea")],
        "heldout": {"path": str(folder / "heldout.parquet")},
        "tokenizer": {"train": {"vocab_size": 300}},
        "sequence_length": 32,
        "model": MODEL,
        "train": {"num_tokens": 32 * 8 * 30, "dtype": "float32", "eval_points": 1, **LEARNING},
        "compute": {"trainers": 1, "packers": 1},
    }
    return content | changes


def swept(folder, mixture=None, sweep=None, **changes):
    settings = {"metric": "train.heldout_nll", "max_runs": 10, "mixture": mixture or {}}
    return parse_spec(content_of(folder, **changes) | {"sweep": settings | (sweep or {})}, "spec")


@pytest.fixture(scope="module")
def made(ray_cluster, folder):
    return run_spec(swept(folder), Quiet())


def test_the_better_source_gets_more_than_its_natural_share(made, folder):
    found = made["sweep"]["mixture"]
    law, sea = found["data"]
    assert (law["name"], sea["name"]) == ("law", "sea")
    made_of = (folder / "store" / "tokens").glob("*/manifest.json")
    tokens = {json.loads(path.read_text())["totals"]["tokens"] for path in made_of}
    assert {law["num_tokens"], sea["num_tokens"]} < tokens  # and the held-out ones
    whole = law["num_tokens"] + sea["num_tokens"]
    assert law["natural"] == pytest.approx(law["num_tokens"] / whole)
    assert sea["weight"] > sea["natural"] == pytest.approx(sea["num_tokens"] / whole)
    assert sea["weight"] > 0.5 and law["weight"] + sea["weight"] == pytest.approx(1)
    assert sea["epochs"] == pytest.approx(sea["weight"] * 7680 / sea["num_tokens"])
    assert found["rank_correlation"] > 0.7
    assert found["measured"] < found["measured_natural"]


def test_its_runs_are_ordinary_ones(made, folder):
    """Equal shares, the natural ones, draws, and the weights found; the last is among the best."""
    variants = made["sweep"]["variants"]
    assert [one["status"] for one in variants[:9]] == ["done"] * 9 and len(variants) == 10
    assert [*variants[0]["values"].values()] == [0.5, 0.5]
    natural = [one["natural"] for one in made["sweep"]["mixture"]["data"]]
    assert [*variants[1]["values"].values()] == pytest.approx(natural, abs=1e-6)
    weights = [one["weight"] for one in made["sweep"]["mixture"]["data"]]
    assert [*variants[-1]["values"].values()] == pytest.approx(weights, abs=1e-6)
    data = content_of(folder)["data"]
    for one, weight in zip(data, variants[4]["values"].values(), strict=True):
        one["weight"] = weight
    by_hand = run_job(parse_spec(content_of(folder, data=data), "spec"), Quiet())
    assert by_hand["status"] == "nothing_to_do"
    assert by_hand["train"]["heldout_halves"]["validation"] == variants[4]["metric"]
    assert made["run"] == made["sweep"]["run"] == made["artifacts"]["weights"]
    assert verify(made["run"], 4)["problems"] == []


def test_again_there_is_nothing_to_do(made, folder):
    again = run_spec(swept(folder), Quiet())
    assert again["status"] == "nothing_to_do" and again["sweep"] == made["sweep"]
    assert plan_spec(swept(folder))["status"] == "nothing_to_do"


def test_the_report_shows_weights_and_rank_correlation(made):
    report = read(made["run"])
    weights, crossed = report.find("mixture", "table")
    assert [row[0] for row in weights.rows] == ["law", "sea"]
    assert len(crossed.rows) == 9
    (facts,) = report.find("lead", "facts")
    assert facts.facts[0].name == "Rank correlation"


def target_of(folder, order=("law", "sea"), source="mix"):
    data = [{"path": str(folder / f"{name}.parquet"), "weight": {"from": source}} for name in order]
    train = {"num_tokens": 32 * 8 * 40, "dtype": "float32", **LEARNING}
    changes = {"data": data, "train": train}
    return {k: v for k, v in content_of(folder, **changes).items() if k not in ("store", "compute")}


def test_a_later_step_of_a_chain_uses_the_weights(made, folder):
    mix = {k: v for k, v in content_of(folder).items() if k not in ("store", "compute")}
    sweep = {"metric": "train.heldout_nll", "max_runs": 10, "mixture": {}}
    steps = {"mix": mix | {"sweep": sweep}, "target": target_of(folder)}
    content = {"job": "chain", "store": str(folder / "store"), "steps": steps}
    spec = parse_spec(content | {"compute": {"trainers": 1, "packers": 1}}, "spec")
    assert plan_spec(spec)["status"] == "to_do"
    found = run_spec(spec, Quiet())["chain"]["steps"]
    assert found["mix"]["status"] == "reused"
    weights = [one["weight"] for one in made["sweep"]["mixture"]["data"]]
    asked = [one["asked"] for one in found["target"]["train"]["data"]]
    assert asked == pytest.approx(weights)
    manifest = json.loads(Path(found["target"]["artifact"], "manifest.json").read_text())
    assert [one["weight"] for one in manifest["inputs"]["data"]["sets"]] == weights
    assert run_spec(spec, Quiet())["status"] == "nothing_to_do"


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_weights_of_other_data_are_refused(made, folder, verb, tmp_path):
    """With exit code 3 where a run is wrong, 2 where the spec alone is."""

    def refused(content):
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(content))
        found = CliRunner().invoke(app, [verb, str(path)])
        return found.exit_code, found.stderr

    store = {"store": str(folder / "store")}
    plain = made["sweep"]["variants"][0]["run"]
    for order, source, said in (
        (("sea", "law"), made["run"], "weights of ['law', 'sea'], in this order; `data`"),
        (("law", "sea"), plain, "`job: train`: it made no weights"),
        (("law", "sea"), str(folder / "nothing"), "is no finished run with `sweep.mixture`"),
        (("law", "sea"), f"{folder}/store/runs/{'0' * 64}", "no run"),
    ):
        code, error = refused(target_of(folder, order, source) | store)
        assert code == 3 and said in error
    mix = {k: v for k, v in content_of(folder).items() if k not in ("store", "compute")}
    sweep = {"metric": "train.heldout_nll", "max_runs": 10, "mixture": {"max_epochs": 9}}
    for order, changes, said in (
        (
            ("sea", "law"),
            {"sweep": sweep},
            "finds weights of ['law', 'sea'], in this order; `data`",
        ),
        (("law", "sea"), {}, "without `sweep.mixture` makes no weights"),
    ):
        steps = {"mix": mix | changes, "target": target_of(folder, order)}
        code, error = refused({"job": "chain", "steps": steps} | store)
        assert code == 2 and said in error


@pytest.mark.parametrize(
    ("sweep", "changes", "said"),
    [
        ({"over": {"train.learning_rate": [1]}}, {}, r"give either `over` or `mixture`"),
        ({"search": "random"}, {}, r"`search`: the weights of a `mixture` are drawn"),
        ({"stop": {"name": "asha"}}, {}, r"`stop`: a run that is stopped says nothing"),
        ({"max_runs": None}, {}, r"`max_runs`: `mixture` needs it"),
        ({"max_runs": 6}, {}, r"`sweep.max_runs: 6`: 2 data sets need 7 runs"),
        ({}, {"data": {"path": "x"}}, r"needs `job: train` with a list of data sets"),
        ({"mixture": {"regression": "forest"}}, {}, r"`sweep.mixture.regression`: 'forest'"),
    ],
)
def test_bad_mixtures(folder, sweep, changes, said):
    with pytest.raises(SpecError, match=said):
        swept(folder, sweep=sweep, **changes)


def test_bad_weights(folder):
    data = content_of(folder)["data"]
    data[0]["weight"] = {"from": "mix"}
    with pytest.raises(SpecError, match=r"give each one `weight: \{from: mix\}`"):
        parse_spec(content_of(folder, data=data), "spec")
    heldout = {"path": "x", "weight": {"from": "mix"}}
    with pytest.raises(SpecError, match=r"`heldout.weight`: held-out data are not trained on"):
        parse_spec(content_of(folder, heldout=heldout), "spec")
    steps = {"mix": {"job": "train", "data": {"path": "x"}}, "target": target_of(folder)}
    with pytest.raises(SpecError, match=r"without `sweep.mixture` makes no weights"):
        run_spec(parse_spec({"job": "chain", "store": "x", "steps": steps}, "spec"), Quiet())


def test_a_training_too_long_for_the_data_is_refused(made, folder):
    with pytest.raises(SpecError, match=r"4 epochs of all data are .* the training has 1e\+08"):
        run_spec(swept(folder, {"num_tokens": 100_000_000}), Quiet())
