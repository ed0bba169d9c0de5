"""What a trainer trains: a model and its objective, with all that depends on the kind of model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.models.causal_lm import compile_layers, layers_of, set_attention
from stillhouse.models.head import logit_rule
from stillhouse.models.inspection import model_shape
from stillhouse.spec import Optimisation
from stillhouse.training.group import WorkerGroup
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy

_DRAWS = 12
"""First word of the seed of a step's random draws."""

MakeObjective = Callable[[ObjectiveFacts], Any]


class Learner(nn.Module):
    """Model and objective in one module, so that FSDP2 gathers what both need around its forward.

    The objective may be a module too; its parameters are trained and kept with the model's.
    """

    def __init__(
        self, model: nn.Module, objective: Any, settings: Optimisation, group: WorkerGroup
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self._seed, self._rank = settings.seed, group.rank

    def forward(self, inputs: Tensor, signals: Mapping[str, Tensor]) -> LossValue:
        return self.objective(self.model, inputs, signals)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the model, and under `objective.` those of the objective."""
        own = self.objective if isinstance(self.objective, nn.Module) else nn.Module()
        named = {f"objective.{name}": one for name, one in own.named_parameters()}
        return dict(self.model.named_parameters()) | named

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What checkpoints keep beside the optimiser's moments, by name."""
        return self.trained

    def at_step(self, step: int, num_steps: int) -> None:
        """Before every step, on every worker.

        Dropout depends on seed, step and worker alone: a training resumes exactly.
        """
        key = np.random.SeedSequence([_DRAWS, self._seed, step, self._rank])
        torch.manual_seed(int(key.generate_state(1)[0]))
        if hasattr(self.objective, "at_step"):
            self.objective.at_step(step, num_steps)

    def survey(self, inputs: Tensor, signals: Mapping[str, Tensor]) -> Tensor:
        """What the objective asks of every row of a global batch: [b, m]."""
        return self.objective.survey(self.model, inputs, signals)

    @property
    def layers(self) -> nn.ModuleList:
        """Sharded one by one."""
        return nn.ModuleList()

    @property
    def rows_together(self) -> int:
        """Consecutive rows of a global batch that have to enter one forward pass."""
        return getattr(self.objective, "rows_together", 1)

    def units(self, inputs: Tensor) -> int:
        """Tokens, or images, in a row of a batch."""
        return 1

    def flops(self, inputs: Tensor) -> float:
        """Of a row's forward and backward pass; 0 where they are not counted."""
        return 0.0


class LanguageLearner(Learner):
    """A causal language model, on batches of token ids [B, T].

    Args:
        model: float32 weights, on its device; changed in place.
        objective: default `CrossEntropy` with the settings' `z_loss`.
        bos_id: put before every sequence, for the model only.
        teachers: on the device; objectives with `needs_models` get them, frozen.
        vocab_size: of the tokenizer.
        activation_checkpointing: keep only the layers' inputs and recompute the rest in backward.

    Raises:
        ModelError: as `logit_rule`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: MakeObjective | None,
        settings: Optimisation,
        *,
        device: torch.device,
        group: WorkerGroup,
        bos_id: int | None = None,
        teachers: Sequence[PreTrainedModel] = (),
        vocab_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        compiled = settings.compile == "on" or (
            settings.compile == "auto" and device.type == "cuda"
        )
        self._teachers = tuple(teachers)
        for teacher in teachers:
            teacher.eval().requires_grad_(False)
            if compiled:
                compile_layers(teacher)
        facts = ObjectiveFacts(
            logit_rule(model),
            bos_id,
            compiled,
            group=group,
            models=self._teachers,
            config=model.config,
            vocab_size=vocab_size,
        )
        made = objective(facts) if objective else CrossEntropy(facts, settings.z_loss)
        super().__init__(model, made, settings, group)
        self._num_extra, self._shape = int(bos_id is not None), model_shape(model)
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_layers(model)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: one for name, one in super().trained.items() if one.requires_grad}

    @property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.model)

    def forward(self, inputs: Tensor, signals: Mapping[str, Tensor]) -> LossValue:
        student: Any = self.model
        for model in (student, *self._teachers):
            set_attention(model, "auto", inputs.shape[1] + self._num_extra)
        return super().forward(inputs, signals)

    def units(self, inputs: Tensor) -> int:
        return inputs.shape[1]

    def flops(self, inputs: Tensor) -> float:
        # frozen weights have no gradients of their own
        passes = 3 if all(one.requires_grad for one in self.model.parameters()) else 2
        return passes * self._shape.flops_per_token(inputs.shape[1]) * inputs.shape[1]
