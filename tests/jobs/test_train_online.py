"""`train.select: online`: the batches do not depend on who scores and who trains."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import Quiet, make_models
from trainings import tokens_of, train_task

from stillhouse.actors import windows
from stillhouse.compute_settings import ComputeSettings
from stillhouse.errors import ModelError
from stillhouse.jobs.run import run_job
from stillhouse.models.causal_lm import build_model, save_model
from stillhouse.pipelines import training
from stillhouse.spec import ModelSettings, ScoringSettings
from stillhouse.training.online import best_of, online_scorer
from stillhouse.training.order import NO_SAMPLES, chain, default_lanes
from stillhouse.training.spec import TrainSpec
from stillhouse.training.task import OnlineTask, StartModel

LENGTH, PART_ROWS, BATCH, TAU = 16, (70, 58), 8, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two parts of tokens, a tokenizer and two models that no training has seen."""
    folder = tmp_path_factory.mktemp("online")
    make_models(folder)
    (folder / "tokens").mkdir()
    for number, rows in enumerate(PART_ROWS):
        ids = np.random.default_rng(number).integers(5, 250, rows * LENGTH, np.uint16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids), LENGTH)
        pq.write_table(pa.table({"input_ids": column}), folder / "tokens" / f"{number}.parquet")
    return folder


@pytest.fixture
def parse(place, tmp_path):
    def call(compute=None, **changes):
        content = {
            "job": "train",
            "store": str(tmp_path / "store"),
            "data": {"path": str(place / "tokens")},
            "tokenizer": str(place / "tokenizer"),
            "model": {"hidden_size": 32, "num_layers": 1},
            "train": {"select": "online", "global_batch": BATCH, "learning_rate": 1e-2},
            "online": {
                "prior": {"path": str(place / "prior")},
                "conditional": {"path": str(place / "conditional")},
                "tau": TAU,
            },
            "compute": compute or {},
        }
        return TrainSpec.model_validate(content | changes)

    return call


def expected_order(place, num_steps):
    """The chain over the best of each window, chosen in this process."""
    candidates = TAU * BATCH
    online = OnlineTask(
        candidates=candidates,
        lanes=default_lanes(candidates, sum(PART_ROWS)),
        shuffled=1 << 20,  # whole lanes, as by default here
        prior=StartModel(str(place / "prior"), "p"),
        conditional=StartModel(str(place / "conditional"), "c"),
        scoring=ScoringSettings(),
        hidden={},
        gpus=0,
        threads=1,
    )
    data = tokens_of(*(place / "tokens" / f"{n}.parquet" for n in range(2)))
    task = train_task(data, place / "tokenizer", num_steps, online=online)
    scorer, state = online_scorer(task, 0, 1), NO_SAMPLES
    for number in range(num_steps):
        state = chain(state, best_of([scorer.window(number)], BATCH).samples)
    return state.hex()


@pytest.mark.soak
@pytest.mark.parametrize(("trainers", "scorers"), [(1, 1), (2, 2)])
def test_any_number_of_scorers_and_trainers(ray_cluster, place, parse, trainers, scorers):
    result = run_job(parse({"trainers": trainers, "scorers": scorers}), Quiet())
    trained = result["train"]
    num_steps = sum(PART_ROWS) // (TAU * BATCH)  # one pass over the candidates
    assert trained["num_steps"] == num_steps
    assert trained["num_tokens"] == num_steps * BATCH * LENGTH
    assert trained["order_sha256"] == expected_order(place, num_steps)
    assert 0 <= trained["data_wait_share"] <= 1


def test_scorers_ask_for_what_scorers_need(monkeypatch):
    requested = []

    class Recorder:
        @classmethod
        def options(cls, **options):
            requested.append(options)
            return cls

        @staticmethod
        def remote(*_):
            return None

    monkeypatch.setattr(windows, "OnlineScorer", Recorder)
    monkeypatch.setattr(training.ray, "kill", lambda _: None)
    scorer = {"gpus": 0.25, "accelerator": "L4", "labels": {"pool": "spot"}}
    compute = ComputeSettings(scorers=2, gpus_per_worker=1, scorer=scorer)
    task = SimpleNamespace(online=SimpleNamespace(lanes=1), fingerprint="a" * 64)
    store = SimpleNamespace(find_manifest=lambda *_: None)
    ctx = SimpleNamespace(compute=compute, close_pool=lambda: None, dry=False, store=store)
    with training.online_scorers(ctx, task) as made:
        assert made[1] == {"CPU": 0, "GPU": 0.25}
    [options] = requested
    assert options["num_gpus"] == 0.25
    assert (options["accelerator_type"], options["label_selector"]) == ("L4", {"pool": "spot"})


def test_section_and_setting_go_together(parse):
    with pytest.raises(ValueError, match=r"`train.select: online` and the section `online` go"):
        parse(train={"global_batch": BATCH})
    with pytest.raises(ValueError, match=r"`train.select: online` and the section `online` go"):
        parse(online=None)
    sets = [{"path": "a"}, {"path": "b"}]
    with pytest.raises(ValueError, match=r"chooses from one data set, not from a mixture"):
        parse(data=sets)


def test_models_that_do_not_fit(ray_cluster, parse, place, tmp_path):
    settings = ModelSettings(hidden_size=32, num_layers=1)
    other = build_model(settings, vocab_size=448, sequence_length=32, seed=0, eos_id=0)
    save_model(other, tmp_path / "other")
    online = {
        "prior": {"path": str(place / "prior")},
        "conditional": {"path": str(tmp_path / "other")},
        "tau": TAU,
    }
    spec = parse(online=online)
    with pytest.raises(ModelError, match=r"the conditional has a vocabulary of 448 tokens"):
        run_job(spec, Quiet())
