"""A distiller of one's own: of each class the real images that the teacher is surest of.

In the folder that holds this file, `stillhouse run` a spec with

    teachers: [{name: "tiny_network:make"}]
    method: {name: "tiny_distiller:Surest", images_per_class: 2}

Labels, choosing, tests, controls, retries and the report follow from the class.
"""

from typing import Annotated

import torch
from pydantic import Field

from stillhouse.distillation.decoupled import DecoupledMethod, UnitMade, UnitWork


class Surest(DecoupledMethod):
    """Real images by the teacher's probability of their class; `skip` leaves the surest out."""

    skip: Annotated[int, Field(ge=0)] = 0

    def make(self, work: UnitWork) -> UnitMade:
        """The images of one class, standardised [images_per_class, C, H, W]; no losses."""
        label = work.unit.index
        images = work.prepared.train[work.prepared.train_labels == label]
        with torch.no_grad():
            sure = work.teacher(images).softmax(1)[:, label].argsort(descending=True, stable=True)
        return images[sure[self.skip : self.skip + self.images_per_class]], []
