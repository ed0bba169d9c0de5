"""Reading a distilled set, without Ray.

import stillhouse
small = stillhouse.open_distilled("store/runs/...")      # a run, an artifact or STORE#name
small.images, small.labels, small.learning_rate
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.errors import ArtifactError
from stillhouse.reading.readers import Artifact, Sought, find_folder
from stillhouse.storage.filesystem import join, read_bytes
from stillhouse.storage.parquet import read_table
from stillhouse.storage.store_options import known_options

_DISTILLED = Sought("distilled", "distilled_fingerprint", "a distilled set", "distilled nothing")


class Distilled(Artifact):
    """A distilled set as a network is trained on it.

    Attributes:
        images: float32 [N, C, H, W], preprocessed.
        labels: classes int64 [N], indices into `class_names`.
        soft_labels: logits float32 [N, num_classes], or None.
        learning_rate: learned with the images, or None.
        preprocessing: `mean` and `std` [C] of pixels in [0, 1], or ZCA's `mean` [D], `matrix` and
            `inverse` [D, D] (`prepared.Zca`).
    """

    def __init__(self, uri: str) -> None:
        from safetensors.numpy import load

        from stillhouse.distillation.stored_sets import PREPROCESSING, read_set

        super().__init__(uri, "distilled")
        part = self.parts[0].uri
        found = read_set(read_table(part), part)
        self.images: NDArray[np.float32] = found.images.numpy()
        self.labels: NDArray[np.int64] = found.labels.numpy()
        soft = found.label_logits
        self.soft_labels: NDArray[np.float32] | None = None if soft is None else soft.numpy()
        self.learning_rate = found.learning_rate
        self.preprocessing: dict[str, NDArray[np.float32]] = load(
            read_bytes(join(self.about, PREPROCESSING))
        )

    @property
    def class_names(self) -> list[str]:
        """In label order."""
        return list(self.manifest.totals["class_names"])

    @property
    def num_bytes(self) -> int:
        """What the set costs to store, labels included, pictures to look at not."""
        return int(self.manifest.totals["bytes"])

    @property
    def trained_by(self) -> dict[str, Any]:
        """How networks were trained on the set when it was judged.

        `recipe` (`recipes.Recipe`), DSA groups `augmentation`, kind of `labels`, `temperature` of
        soft ones, and with labels of views the seed that draws the views again
        (`augment.epoch_views`). Empty of a set that was made before this was kept.
        """
        return dict(self.manifest.totals.get("trained_by", {}))

    def view_labels(self) -> NDArray[Any]:
        """Stored labels of views, [epochs, N, num_classes] logits or [epochs, N, 2] distances.

        Raises:
            ArtifactError: the set's labels are of its images.
        """
        from safetensors.numpy import load

        from stillhouse.distillation.stored_sets import LABELS

        if LABELS not in self.manifest.files:
            raise ArtifactError(f"{self.uri} has one label an image, none of views")
        return load(read_bytes(join(self.about, LABELS)))["labels"]

    def to_datasets(self) -> Any:
        """A Hugging Face `Dataset` of the stored rows: `image` (to look at), `label`, `values`.

        INFER's are real images, then compensators (`stored_sets`).
        """
        import datasets

        files = [part.uri for part in self.parts]
        known = known_options(self.uri) or None
        return datasets.load_dataset(
            "parquet", data_files=files, split="train", storage_options=known
        )


def open_distilled(uri: str) -> Distilled:
    """Open a distilled set by the URI of its folder, of the run that made it, or `STORE#name`.

    Raises:
        ArtifactError: nothing there, an unfinished run, or an artifact of another kind.
    """
    return Distilled(find_folder(uri, _DISTILLED))
