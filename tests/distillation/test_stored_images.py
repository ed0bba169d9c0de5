import numpy as np
from PIL import Image

from stillhouse.distillation.image_sources import ImageData
from stillhouse.distillation.stored_images import DEAD_LETTERS, ImageSourceTask, run_source
from stillhouse.storage.artifact import Store
from stillhouse.storage.parquet import read_table


def test_every_dead_letter_is_listed_in_a_file_of_the_artifact(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((4, 4), i, np.uint8)).save(
                tmp_path / "data" / name / f"{i}.png"
            )
    for i in range(120):
        (tmp_path / "data" / "b" / f"bad{i}.jpg").write_bytes(b"hello")
    store = Store(str(tmp_path / "store"))
    data = ImageData(path=str(tmp_path / "data"), max_bad_rows=0.99)
    run_source(store, ImageSourceTask("1" * 64, data))
    made = store.get_manifest("images", "1" * 64)
    assert made.totals["dead_letters"] == 120
    listed = read_table(store.path("images", "1" * 64, DEAD_LETTERS)).to_pylist()
    assert {row["file"] for row in listed} == {f"b/bad{i}.jpg" for i in range(120)}
    assert list(made.files) == [DEAD_LETTERS]
