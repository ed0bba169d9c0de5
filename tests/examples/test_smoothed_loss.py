"""An objective that is not ours, in examples/extend/: in a trainer, and in a whole job."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small import LEARNING, MODEL, Quiet

from stillhouse.custom_code import find_named
from stillhouse.errors import SpecError
from stillhouse.jobs.run import run_job
from stillhouse.models.causal_lm import build_model
from stillhouse.models.head import PLAIN
from stillhouse.spec import ModelSettings
from stillhouse.training.objectives import ObjectiveFacts, make_objective
from stillhouse.training.spec import ObjectiveSettings, TrainSpec

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
NAME, LENGTH = "smoothed_loss:SmoothedLoss", 16


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the file in it, where the job is run."""
    shutil.copy(EXTEND / "smoothed_loss.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_loss_is_that_of_smoothed_labels(folder):
    model = build_model(ModelSettings(**MODEL), vocab_size=64, sequence_length=8, seed=0, eos_id=0)
    ids = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(0))
    log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    nll = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    settings = ObjectiveSettings.model_validate({"name": NAME, "smoothing": 0.2})
    code = find_named("train.objective.name", NAME)
    value = make_objective(settings, code, ObjectiveFacts(PLAIN))(model, ids, {})
    expected = 0.8 * nll.mean() - 0.2 * log_probs.mean()
    torch.testing.assert_close(value.objective, expected)
    torch.testing.assert_close(value.nll, nll.mean())
    torch.testing.assert_close(value.token_nll, nll)
    wrong = ObjectiveSettings.model_validate({"name": NAME, "sharpness": 1})
    with pytest.raises(SpecError, match=r"smoothed_loss:SmoothedLoss`: .* 'sharpness'"):
        make_objective(wrong, code, ObjectiveFacts(PLAIN))


def test_names_that_are_none(folder):
    with pytest.raises(SpecError, match=r"smoothed_loss:Sharp`: the module has no `Sharp`"):
        find_named("train.objective.name", "smoothed_loss:Sharp")
    with pytest.raises(ValueError, match=r"`objective.name: focal`: one of cross_entropy, "):
        ObjectiveSettings(name="focal")
    with pytest.raises(ValueError, match=r"`objective.gamma`: cross_entropy has `z_loss` alone"):
        ObjectiveSettings.model_validate({"gamma": 2})


def test_a_job_minimises_it(folder, untrained, ray_cluster):
    """Workers get the code from the folder that the job is run in; its content names the model."""
    ids = (np.arange(32)[:, None] + np.arange(LENGTH)) % 250
    column = pa.FixedSizeListArray.from_arrays(pa.array(ids.astype(np.uint16).ravel()), LENGTH)
    pq.write_table(pa.table({"input_ids": column}), folder / "0.parquet")

    def train(**objective):
        content = {
            "job": "train",
            "store": str(folder / "store"),
            "data": {"path": str(folder / "0.parquet")},
            "tokenizer": untrained["tokenizer"],
            "model": MODEL,
            "train": {"num_tokens": 4 * 8 * LENGTH, **LEARNING, "objective": objective},
        }
        return run_job(TrainSpec.model_validate(content), Quiet())

    smoothed = train(name=NAME, smoothing=0.5)
    manifest = json.loads(Path(smoothed["artifacts"]["model"], "manifest.json").read_text())
    said = manifest["settings"]["train"]["objective"]
    assert (said["name"], said["smoothing"]) == (NAME, 0.5) and len(said["code"]) == 64
    with open(folder / "smoothed_loss.py", "a") as file:
        file.write("\n# changed\n")
    assert train(name=NAME, smoothing=0.5)["model_fingerprint"] != smoothed["model_fingerprint"]
