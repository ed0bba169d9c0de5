"""What a trainer trains: a model and its objective, with all that depends on the kind of model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.causal_lm import compile_layers, layers_of, set_attention
from stillhouse.models.head import PLAIN, logit_rule
from stillhouse.models.inspection import model_shape
from stillhouse.spec import Optimisation
from stillhouse.training.group import WorkerGroup
from stillhouse.training.hiding import Hiding
from stillhouse.training.objectives import LossValue, ObjectiveFacts
from stillhouse.training.objectives.cross_entropy import CrossEntropy
from stillhouse.training.stream import Batch

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
        self._hiding: Hiding | None = getattr(objective, "hiding", None)
        self._seed, self._rank, self._step = settings.seed, group.rank, 0

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
        self._step = step
        key = np.random.SeedSequence([_DRAWS, self._seed, step, self._rank])
        torch.manual_seed(int(key.generate_state(1)[0]))
        if hasattr(self.objective, "at_step"):
            self.objective.at_step(step, num_steps)

    def prepared(self, batch: Batch) -> Batch:
        """This worker's rows of a global batch, with tokens hidden if the objective hides any."""
        hiding = self._hiding
        return batch if hiding is None else hiding.in_batch(batch, self._seed, self._step)

    def counted(self, inputs: Tensor) -> Tensor | None:
        """Which tokens [N, T] of held-out sequences count, by the objective; None: all."""
        return None if self._hiding is None else self._hiding.held_out(inputs)[1]

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
    """A causal or masked language model, on batches of token ids [B, T].

    Args:
        model: float32 weights, on its device; changed in place.
        objective: default `CrossEntropy` with the settings' `z_loss`.
        bos_id: put before every sequence, for the model only.
        teachers: on the device; objectives with `needs_models` get them, frozen.
        vocab_size: of the tokenizer.
        mask_id: of a masked model: the tokenizer's mask token.
        activation_checkpointing: keep only the layers' inputs and recompute the rest in backward.

    Raises:
        ModelError: as `logit_rule`.
        SpecError: an objective of causal models for a masked one.
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
        mask_id: int | None = None,
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
            logit_rule(model) if mask_id is None else PLAIN,
            bos_id,
            compiled,
            group=group,
            models=self._teachers,
            config=model.config,
            vocab_size=vocab_size,
            mask_id=mask_id,
        )
        made = objective(facts) if objective else CrossEntropy(facts, settings.z_loss)
        if mask_id is not None and getattr(made, "hiding", None) is None:
            raise SpecError(
                "`train.objective`: this class is of causal language models, and `init` is a "
                "masked one: use `masked_tokens` or a class with `hiding`"
            )
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
