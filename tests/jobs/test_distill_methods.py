"""The decoupled methods as whole jobs on a real Ray."""

import pytest
import torch
from small import Quiet

import stillhouse
from stillhouse.distillation.spec import DistillSpec
from stillhouse.jobs.run import run_job
from stillhouse.jobs.verify import verify

pytestmark = pytest.mark.soak

NETWORK = {"name": "convnet", "depth": 2, "width": 4, "norm": "batch"}
TEACHERS = [NETWORK, NETWORK | {"width": 6}]
BATCHES = {"batch_size": 10}
DIGITS = {
    "job": "distill",
    "data": {"dataset": "digits", "num_images": 300},
    "network": NETWORK,
    "squeeze": {"optimiser": "sgd", "learning_rate": 0.1, "epochs": 2, "views": {"mix": "none"}},
    "evaluate": {"seeds": 2, "epochs": 4, "full": {"epochs": 1}},
    "controls": ["random_real", "herding", "full"],
    "compute": {"distillers": 2},
}
# settings, teachers, images, bytes of images and of labels (float16 each; a byte for a class)
METHODS = {
    "sre2l": ({"iterations": 3, **BATCHES}, 1, 30, 30 * 64, 30 * 20),
    # 30 images pay for 20 real ones and 2 x 2 compensators; 60 is what they expand to
    "infer": ({"iterations": 3}, 2, 60, 24 * 64, 60 * 20),
    "rded": ({"num_candidates": 10}, 1, 30, 30 * 64, 30 * 20),
    "nrr_dd": (
        {"iterations": 2, "num_candidates": 10, "label_epochs": 2, **BATCHES},
        1,
        30,
        30 * 64,
        30 + 2 * 30 * 4,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_decoupled_job_ends_in_a_set_within_its_budget(name, ray_cluster, tmp_path):
    settings, num_teachers, count, image_bytes, label_bytes = METHODS[name]
    method = {"name": name, "images_per_class": 3, **settings}
    content = {**DIGITS, "store": str(tmp_path), "teachers": TEACHERS[:num_teachers]}
    result = run_job(DistillSpec.model_validate({**content, "method": method}), Quiet())
    small = stillhouse.open_distilled(result["run"])
    totals = small.manifest.totals
    assert small.images.shape == (count, 1, 8, 8)
    assert (totals["image_bytes"], totals["label_bytes"]) == (image_bytes, label_bytes)
    assert torch.isfinite(torch.from_numpy(small.images)).all()
    found = result["distill"]
    assert found["bytes"] == small.num_bytes
    assert set(found["controls"]) == {"random_real", "herding", "full"}
    assert found["controls"]["random_real"]["bytes"] <= found["bytes"]
    assert small.trained_by["recipe"]["epochs"] == 4
    assert small.trained_by["view_seed"] == (0 if name == "nrr_dd" else None)
    assert verify(result["run"], 0)["problems"] == []
    again = run_job(DistillSpec.model_validate({**content, "method": method}), Quiet())
    assert again["status"] == "nothing_to_do"
