"""The table of methods x images per class: what other runs of a store made of the same images."""

import json

from stillhouse.jobs.other_sets import other_sets
from stillhouse.storage.artifact import Store


def test_runs_on_the_same_images_and_network_are_listed_by_images_and_method(tmp_path):
    store = Store(str(tmp_path))

    def write(run, **changes):
        accuracy = {"mean": 0.7, "std": 0.01, "seeds": 3}
        made = {
            "method": "mtt",
            "images_per_class": 1,
            "bytes": 662,
            "judged_by": "p1, 300 epochs",
            "seconds": 50.0,
            "networks": {"convnet-3": accuracy},
        }
        images = store.path("images", changes.pop("images", "a" * 64))
        result = {"job": "distill", "artifacts": {"images": images}, "distill": made | changes}
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))

    write("own")
    write("ten", images_per_class=10)
    write("sre2l", method="sre2l")
    write("one")
    write("other-images", images="b" * 64)
    write("other-network", networks={"resnet18": {"mean": 0.9, "std": 0, "seeds": 1}})
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "status.json").write_text("{}")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "result.json").write_text("{")
    found = other_sets(store, "a" * 64, "convnet-3", store.path("runs", "own"))
    assert [(one.method, one.images_per_class, one.run) for one in found] == [
        ("MTT", 1, "one"),
        ("SRe2L", 1, "sre2l"),
        ("MTT", 10, "ten"),
    ]
    assert (found[0].mean, found[0].std, found[0].num_bytes, found[0].seconds) == (
        0.7, 0.01, 662, 50.0,
    )  # fmt: skip


def test_a_store_without_runs_has_none(tmp_path):
    store = Store(str(tmp_path))
    assert other_sets(store, "a" * 64, "convnet-3", store.path("runs", "own")) == []
