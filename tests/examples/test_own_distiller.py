"""A method and a network from a folder of the user's, by the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from small import DIGITS

import stillhouse
from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.images import load_images

EXTEND = Path(__file__).parents[2] / "examples" / "extend"
NETWORK = {"name": "tiny_network:make", "options": {"width": 4}}


def test_a_distiller_and_a_network_are_one_file_each(tmp_path):
    spec = DIGITS | {
        "store": str(tmp_path / "store"),
        "network": NETWORK,
        "teachers": [NETWORK],
        "squeeze": {"epochs": 2},
        "evaluate": {"seeds": 1, "choose_seeds": 1, "epochs": 2},
        "method": {"name": "tiny_distiller:Surest", "images_per_class": 2, "skip": 1},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    command = [str(Path(sys.executable).parent / "stillhouse"), "run", str(tmp_path / "spec.yaml")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=EXTEND)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["distill"]["method"] == "tiny_distiller:Surest"
    assert [*result["distill"]["networks"]] == ["tiny_network:make, width 4"]
    small = stillhouse.open_distilled(result["run"])
    assert small.labels.tolist() == np.arange(10).repeat(2).tolist()
    assert small.soft_labels.shape == (20, 10)
    real = load_images(ImageData(**DIGITS["data"])).train
    mean, std = small.preprocessing["mean"], small.preprocessing["std"]
    images = (real.pixels() - mean[:, None, None]) / std[:, None, None]
    for image, label in zip(small.images, small.labels, strict=True):
        own = np.abs(images[real.labels == label] - image).max((1, 2, 3))
        assert own.min() < 1e-4  # a training image of its class
