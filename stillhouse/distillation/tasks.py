"""What a distillation does in the store: tasks on images that a worker holds."""

from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import ClassVar

import numpy as np
import pyarrow as pa

from stillhouse.distillation.images import ImageData, ImageSet, load_images
from stillhouse.distillation.prepared import IMAGES, ImageHost, Preparation
from stillhouse.distillation.stored_sets import lists
from stillhouse.fingerprint import sha256
from stillhouse.models.device import peak_bytes, reset_peak
from stillhouse.storage.artifact import Manifest, PartRef, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.parquet import parquet_bytes
from stillhouse.storage.task import Output, Task

LABEL_SEED = 0
"""Of the views that stored labels are of; every evaluation sees the same ones."""
SPLITS = ("train", "validation", "test")
DEAD_LETTERS = "dead_letters.parquet"
"""Rows of file, row and reason."""


@dataclass(frozen=True)
class ImageTask(Task):
    """Work on the prepared images of a job; a subclass is a frozen dataclass with a `make`.

    Attributes:
        given: the images.
    """

    KIND: ClassVar[str] = "distilled"

    given: Preparation

    def make(self, host: ImageHost) -> Output:
        """Do the work."""
        raise NotImplementedError

    def run(self, store: Store, host: ImageHost, loaded: object = None) -> Output:
        """Do the work; how many seconds and bytes of memory it took is in `info`."""
        device = host.prepared.device
        reset_peak(device)
        started = perf_counter()
        made = self.make(host)
        took = {"seconds": perf_counter() - started, "peak_bytes": peak_bytes(device)}
        return replace(made, info={**made.info, **took})


def file_part(path: str, data: bytes, num_rows: int) -> PartRef:
    """A file as its receipt names it: where it was deleted, the task is one to do again."""
    return PartRef(path, num_rows, 0, len(data), sha256(data))


@dataclass(frozen=True)
class ImagesTask(ImageTask):
    """A source to read, check and split, once for every worker: the artifact `images/<name>`.

    Its name is that of the files' content and of how they are read. Three parts (train, validation,
    test), one row an image: `pixels` fixed_size_list<uint8, C*H*W>, `label` int32. The images that
    were left out are in `dead_letters.parquet` beside the manifest, if there are any.
    """

    KIND: ClassVar[str] = IMAGES

    data: ImageData

    @property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The artifact's name."""
        return self.given.images

    def run(self, store: Store, host: ImageHost, loaded: object = None) -> Output:
        """Commit the artifact.

        Raises:
            InputError: see `load_images`.
        """
        name = self.fingerprint
        splits = load_images(self.data)
        sets = [splits.train, splits.validation, splits.test]
        parts = [
            store.put_part(
                f"{IMAGES}/parts/{name}-{which}.parquet", images_table(one), num_tokens=0
            )
            for which, one in zip(SPLITS, sets, strict=True)
        ]
        letters = [asdict(letter) for one in sets for letter in one.dead_letters]
        files: dict[str, str] = {}
        if letters:
            listed = parquet_bytes(pa.Table.from_pylist(letters))
            stands = create_or_adopt(store.path(IMAGES, name, DEAD_LETTERS), listed)
            files[DEAD_LETTERS] = sha256(stands)
        totals = {
            "shape": list(splits.train.shape),
            "class_names": list(splits.train.class_names),
            "least_per_class": int(np.bincount(splits.train.labels).min()),
            "dead_letters": len(letters),
        }
        settings = self.data.model_dump(mode="json", exclude={"path"})
        manifest = Manifest(IMAGES, name, tuple(parts), {}, settings, totals, {}, files)
        made = store.put_manifest(manifest)
        return Output(counts={"images": made.num_rows}, parts=made.parts)


def images_table(images: ImageSet) -> pa.Table:
    """The rows of one of an images artifact's parts."""
    flat = images.images.reshape(len(images), -1)
    return pa.table({"pixels": lists(flat), "label": pa.array(images.labels.astype(np.int32))})
