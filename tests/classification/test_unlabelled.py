"""Images without labels beside labelled ones: how they are read, and what batches are made of."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_parts import COUNTS, NAME, make_set, make_task, put_images, put_unlabelled
from PIL import Image

from stillhouse.classification.stream import ImageStream, bags_of
from stillhouse.classification.unlabelled import UnlabelledImages, UnlabelledTask, read_pixels
from stillhouse.distillation.prepared import ImageHostSettings, Preparation, prepare
from stillhouse.errors import InputError
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import commit

OTHERS = 40


@pytest.fixture
def store(tmp_path):
    made = Store(str(tmp_path / "store"))
    put_images(made)
    return made


def write_images(folder, pixels):
    """Some of them deeper than others, as no class says where."""
    for i, image in enumerate(pixels):
        place = folder / ("deep/er" if i % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03}.png")


def test_a_folder_and_parquet_without_labels_are_read(store, tmp_path):
    pixels = make_set(9, 6).images[:, 0]
    write_images(tmp_path / "folder", pixels)
    (tmp_path / "folder" / "broken.png").write_bytes(b"no image")
    encoded = [{"bytes": path.read_bytes()} for path in sorted(tmp_path.rglob("0*.png"))]
    pq.write_table(pa.table({"picture": encoded}), tmp_path / "others.parquet")
    folder = UnlabelledImages(path=str(tmp_path / "folder"), max_bad_rows=1)
    found, dead = read_pixels(folder, None)
    assert sorted(image.tobytes() for image in found) == sorted(p.tobytes() for p in pixels)
    assert [one.file for one in dead] == ["broken.png"]
    table = UnlabelledImages(path=str(tmp_path / "others.parquet"), image_column="picture")
    rows, _ = read_pixels(table, None)
    assert sorted(image.tobytes() for image in rows) == sorted(p.tobytes() for p in pixels)
    host = ImageHostSettings(Preparation(NAME, zca=False), "cpu").build(store)
    task = UnlabelledTask(NAME, "c" * 64, None, folder)
    receipt = commit(store, task, task.run(store, host))
    assert receipt.counts == {"images": 6} and receipt.parts[0].num_rows == 6
    elsewhere = replace(task, source=UnlabelledImages(path="elsewhere"))
    assert elsewhere.fingerprint == task.fingerprint


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((16, 16), r"has images of 16x16, `data` of 8x8: set `data\.image_size`"),
        ((8, 8, 3), "has images in colour, `data` grey ones"),
        ((8, 6), "are not square"),
    ],
)
def test_other_kinds_of_images_are_refused(store, tmp_path, shape, match):
    write_images(tmp_path / "folder", np.zeros((3, *shape), np.uint8) + 7)
    host = ImageHostSettings(Preparation(NAME, zca=False), "cpu").build(store)
    source = UnlabelledImages(path=str(tmp_path / "folder"))
    with pytest.raises(InputError, match=match):
        UnlabelledTask(NAME, "c" * 64, None, source).run(store, host)


def test_they_are_scaled_as_labelled_images_are(store):
    prepared = prepare(store, Preparation(NAME, zca=False), torch.device("cpu"))
    known = make_set(0, COUNTS[0]).images / 255
    wanted = (make_set(9, OTHERS).images / 255 - known.mean()) / known.std()
    found = put_unlabelled(store, OTHERS).images(store, prepared)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_both_kinds_of_images_have_their_share_of_the_draws(store):
    """Half of 256 draws of a lane each, every image about as often as the others of its kind."""
    task = make_task({"name": "robust"}, unlabelled=put_unlabelled(store, OTHERS), lanes=2)
    count = COUNTS[0] + OTHERS
    assert task.num_steps == round(5 * count / 16)
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    columns = {"rows": torch.arange(count)}

    def draws(rank, num_workers):
        stream = ImageStream(
            task.order(), images, columns, bags_of(count, 1, 0), rank=rank, num_workers=num_workers
        )
        batches = [stream.next_batch() for _ in range(64)]  # of 16: twice 256 draws a lane
        stream.close()
        assert all(
            torch.equal(one.inputs[:, 0, 0, 0].long(), one.signals["rows"]) for one in batches
        )
        return [one.signals["rows"].tolist() for one in batches]

    alone = draws(0, 1)
    drawn = np.bincount(np.concatenate(alone), minlength=count)
    assert drawn[: COUNTS[0]].sum() == drawn[COUNTS[0] :].sum() == 512
    assert set(drawn[: COUNTS[0]]) <= {5, 6} and set(drawn[COUNTS[0] :]) <= {12, 13}
    both = [first + second for first, second in zip(draws(0, 2), draws(1, 2), strict=True)]
    assert both == alone
