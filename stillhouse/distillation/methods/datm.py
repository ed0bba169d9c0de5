"""DATM: difficulty set by a window of start epochs that grows, and learned soft labels.

Guo et al. 2024: early epochs teach what is easy, late ones what is hard. Start epochs are drawn
uniformly below an end that moves linearly from `first_max_start_epoch` to `max_start_epoch`. The
set starts from images that an expert of a late epoch classifies correctly; the first label of an
image is the mean of the logits of the experts that classify it correctly.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stillhouse.distillation.matching import StartFrom, TrajectoryMethod
from stillhouse.errors import SpecError
from stillhouse.spec import Count


class Datm(TrajectoryMethod):
    """A growing window of start epochs, and learned soft labels (Guo et al. 2024)."""

    experts: ClassVar[Literal["plain", "smooth", "flat"]] = "flat"
    num_steps: Count = 80
    num_iterations: Count = 10_000
    start_from: StartFrom = "right"
    soft_labels: bool = True
    max_loss: Annotated[float, Field(gt=0)] | None = 1.0
    first_max_start_epoch: Count | None = Field(
        default=None, description="the window's end at first; default half of the final one"
    )
    growth_iterations: Count | None = Field(
        default=None, description="until the window's end is reached; default a third of all"
    )

    def window_end(self, num_epochs: int, iteration: int | None = None) -> int:
        last = super().window_end(num_epochs)
        growth = self.growth_iterations or max(1, self.num_iterations // 3)
        if iteration is None or iteration >= growth:
            return last
        first = self.first_max_start_epoch or max(self.min_start_epoch + 1, last // 2)
        return first + (last - first) * iteration // growth

    def check_window(self, num_epochs: int) -> None:
        last = self.window_end(num_epochs)
        first = self.first_max_start_epoch
        if first is not None and not self.min_start_epoch < first <= last:
            raise SpecError(
                f"`method.first_max_start_epoch: {first}` has to lie above `min_start_epoch` "
                f"({self.min_start_epoch}) and at most at `max_start_epoch` ({last})"
            )
        super().check_window(num_epochs)
