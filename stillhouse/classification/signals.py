"""What teachers say of all training images, made once: raw logits, as float16."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from stillhouse.classification.task import StoredClassifier
from stillhouse.errors import InputError
from stillhouse.storage.artifact import Store
from stillhouse.storage.task import Output, Place, Task

if TYPE_CHECKING:
    from torch import Tensor

    from stillhouse.distillation.prepared import ImageHost

_BATCH = 512


@dataclass(frozen=True)
class LogitsTask(Task):
    """One teacher's logits of the training images of an artifact.

    Its part has a row an image: `logits` fixed_size_list<float16, C>, in the order of the job's
    classes.

    Attributes:
        images: fingerprint of the images artifact.
        key: of the teacher in the spec, for messages.
    """

    KIND: ClassVar[str] = "signals"

    images: str
    teacher: StoredClassifier
    key: Place[str]

    @property
    def of_views(self) -> bool:
        """Whether the teacher answers to views of the images."""
        return False

    def shown(self, images: "Tensor") -> "Iterator[Tensor]":
        """All images as the teacher sees them, once for each answer."""
        yield images

    def run(self, store: Store, host: "ImageHost", loaded: object = None) -> Output:
        """Answer to all images.

        Raises:
            InputError: a logit is not finite, or beyond float16; unknown classes.
        """
        import torch

        from stillhouse.classification.stored import load_teacher
        from stillhouse.distillation.stored_sets import lists

        prepared = host.prepared
        teacher = load_teacher(self.teacher, prepared, self.key).to(prepared.device)
        with torch.inference_mode():
            views = [
                torch.cat([teacher(batch).half().cpu() for batch in images.split(_BATCH)])
                for images in self.shown(prepared.train)
            ]
        logits = torch.stack(views, 1) if self.of_views else views[0]
        broken = int((~logits.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise InputError(
                f"`{self.key}`: the logits of {broken} of {len(logits)} images are not finite "
                "numbers of 16 bits: give another teacher"
            )
        table = pa.table({"logits": lists(logits.numpy())})
        return Output((table,), {"images": len(logits)})


@dataclass(frozen=True)
class ViewLogitsTask(LogitsTask):
    """The same for the views of a training: `logits` fixed_size_list<fixed_size_list<float16, C>>.

    Attributes:
        augmentation, seed, views: of the training.
    """

    augmentation: tuple[str, ...]
    seed: int
    views: int

    @property
    def of_views(self) -> bool:
        return True

    def shown(self, images: "Tensor") -> "Iterator[Tensor]":
        from stillhouse.classification.stream import augmented

        rows = np.arange(len(images))
        for view in range(self.views):
            numbers = np.full_like(rows, view)
            yield augmented(images.cpu(), rows, self.augmentation, self.seed, numbers).to(
                images.device
            )
