"""The prepared images of a job in the store: read, checked and split once, for every worker.

Artifact `images/<fingerprint>`: three parts (train, validation, test), one row an image with its
pixels and its class. The images that were left out are in `dead_letters.parquet` beside the
manifest, if there are any.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from stillhouse.distillation.image_sources import ImageData, ImageSplits, load_images
from stillhouse.distillation.images import ImageSet, Pixels
from stillhouse.distillation.list_columns import lists
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, PartRef, Receipt, Store
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.parquet import parquet_bytes, read_table

KIND = "images"
SPLITS = ("train", "validation", "test")
DEAD_LETTERS = "dead_letters.parquet"
"""Rows of file, row and reason."""


@dataclass(frozen=True, slots=True)
class ImageSourceTask:
    """A source to read as the images artifact `fingerprint`."""

    fingerprint: str
    data: ImageData


def run_source(store: Store, task: ImageSourceTask) -> Receipt:
    """Read, check, split and commit the images of a source as an artifact, then its receipt.

    Raises:
        InputError: see `load_images`.
    """
    name, data = task.fingerprint, task.data
    splits = load_images(data)
    sets = [splits.train, splits.validation, splits.test]
    parts = [
        store.put_part(f"{KIND}/parts/{name}-{which}.parquet", images_table(one), num_tokens=0)
        for which, one in zip(SPLITS, sets, strict=True)
    ]
    letters = [asdict(letter) for one in sets for letter in one.dead_letters]
    files: dict[str, str] = {}
    if letters:
        listed = parquet_bytes(pa.Table.from_pylist(letters))
        stands = create_or_adopt(store.path(KIND, name, DEAD_LETTERS), listed)
        files[DEAD_LETTERS] = sha256(stands)
    totals = {
        "shape": list(splits.train.shape),
        "class_names": list(splits.train.class_names),
        "least_per_class": int(np.bincount(splits.train.labels).min()),
        "dead_letters": len(letters),
    }
    settings = data.model_dump(mode="json", exclude={"path"})
    manifest = Manifest(KIND, name, tuple(parts), {}, settings, totals, {}, files)
    made = store.put_manifest(manifest)
    return store.put_receipt(KIND, Receipt(name, made.parts, {"images": made.num_rows}))


def images_table(images: ImageSet) -> pa.Table:
    """One row an image: `pixels` fixed_size_list<uint8, C*H*W>, `label` int32."""
    flat = images.images.reshape(len(images), -1)
    return pa.table({"pixels": lists(flat), "label": pa.array(images.labels.astype(np.int32))})


def read_splits(store: Store, manifest: Manifest) -> ImageSplits:
    """The three sets of an images artifact.

    Raises:
        ArtifactError: a part is missing or broken.
    """
    sets = [_read(store, manifest, part) for part in manifest.parts]
    return ImageSplits(*sets)


def _read(store: Store, manifest: Manifest, part: PartRef) -> ImageSet:
    table = read_table(store.path(part.path))
    shape = tuple(manifest.totals["shape"])
    pixels: Pixels = (
        table["pixels"]
        .combine_chunks()
        .flatten()
        .to_numpy(zero_copy_only=False)
        .reshape(-1, *shape)
    )
    labels = table["label"].to_numpy().astype(np.int64)
    return ImageSet(pixels, labels, tuple(manifest.totals["class_names"]))
