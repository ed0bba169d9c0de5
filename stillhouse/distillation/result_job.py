"""The result as a task: the chosen set with pictures to look at, and what turns pixels into it.

Its folder holds `part-00000.parquet` (`stored_sets`). Beside the manifest lie
`preprocessing.safetensors` (mean and deviation a channel, or ZCA's mean, matrix and inverse) and,
where labels are of views, `labels.safetensors`. The manifest's totals hold learning rate, bytes and
how networks were trained on the set (`trained_by`). The pictures of the report are no part of the
artifact, for some are real images: they lie in a part of their own, the receipt's second one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save

from stillhouse.distillation.pictures import Shown, pictures
from stillhouse.distillation.prepared import Prepared
from stillhouse.distillation.stored_sets import LabelledSet, png_bytes, read_set, set_table
from stillhouse.fingerprint import sha256
from stillhouse.storage.artifact import Manifest, Receipt, Store, libraries
from stillhouse.storage.commit import create_or_adopt
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.layout import about
from stillhouse.storage.parquet import read_table

KIND = "distilled"
PREPROCESSING = "preprocessing.safetensors"
LABELS = "labels.safetensors"


@dataclass(frozen=True, slots=True)
class ResultTask:
    """A set to deliver.

    Attributes:
        fingerprint: of the artifact.
        path: of the chosen set's part.
        label_path: of stored labels of views, or None.
        inputs: what it was made from.
        settings: of the method.
        totals: of the run: bytes, learning rate and the like.
        shown: the sets whose pictures the report shows.
    """

    fingerprint: str
    path: str
    label_path: str | None
    inputs: dict[str, Any]
    settings: dict[str, Any]
    totals: dict[str, Any]
    shown: Shown


def run_result(store: Store, prepared: Prepared, task: ResultTask) -> Receipt:
    """Commit the pictures and the artifact of a task, then its receipt with both parts."""
    given = read_set(read_table(store.path(task.path)), task.path)
    table = set_table(given, _pngs(given, prepared), prepared.class_names)
    part = store.put_part(f"{KIND}/{task.fingerprint}/part-00000.parquet", table, num_tokens=0)
    files = {PREPROCESSING: save(_preprocessing(prepared))}
    if task.label_path is not None:
        files[LABELS] = read_bytes(store.path(task.label_path))
    place = about(f"{KIND}/{task.fingerprint}")
    digests = {
        name: sha256(create_or_adopt(store.path(place, name), data)) for name, data in files.items()
    }
    totals = task.totals | {
        "class_names": list(prepared.class_names),
        "shape": list(prepared.shape),
        "preprocessing": "zca" if prepared.zca is not None else "mean_std",
        "file_bytes": part.num_bytes,
    }
    made_by = {"device": prepared.device.type} | libraries()
    manifest = Manifest(
        KIND, task.fingerprint, (part,), task.inputs, task.settings, totals, made_by, digests
    )
    store.put_manifest(manifest)
    drawn = store.put_part(
        f"{KIND}/parts/{task.fingerprint}-pictures.parquet",
        pictures(store, prepared, task.shown),
        num_tokens=0,
    )
    counts = {"images": part.num_rows}
    return store.put_receipt(KIND, Receipt(task.fingerprint, (part, drawn), counts))


def _pngs(given: LabelledSet, prepared: Prepared) -> list[bytes]:
    """A picture of every row."""
    if given.apart is None:
        return png_bytes(prepared.pixels(given.images))
    real = given.images[: given.apart.num_real]
    return png_bytes(prepared.pixels(real)) + png_bytes(given.apart.pictures())


def _preprocessing(prepared: Prepared) -> dict[str, torch.Tensor]:
    if prepared.zca is not None:
        zca = prepared.zca
        found = {"mean": zca.mean, "matrix": zca.matrix, "inverse": zca.inverse}
    else:
        norm = prepared.standardisation
        found = {"mean": torch.tensor(norm.mean), "std": torch.tensor(norm.std)}
    return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}
