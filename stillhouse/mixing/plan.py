"""How the steps of a mixing run are made up: what each holds, and what arms are rewarded for."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

RewardName: TypeAlias = Literal["alignment", "magnitude", "aggregate"]
RewardKind: TypeAlias = RewardName | Literal["loss", "excess"]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How the steps of a run are made up.

    Attributes:
        target_batches: micro-batches of the target in each update; 0 for none.
        reward: what arms are rewarded for; None where nothing is learnt. `excess` is DoReMi's.
        target_gradient: of which weights; only for rewards by gradients.
        parameters: whose gradients are compared.
    """

    target_batches: int
    reward: RewardKind | None = None
    target_gradient: Literal["before_step", "after_step"] = "before_step"
    parameters: str = "output_head"

    @property
    def by_gradient(self) -> bool:
        """Whether rewards compare gradients."""
        return self.reward in ("alignment", "magnitude", "aggregate")

    def passes(self, slots: int) -> int:
        """Gradient passes of a step with so many auxiliary micro-batches."""
        again = self.by_gradient and self.target_gradient == "after_step"
        return slots + self.target_batches * (2 if again else 1)
