"""A causal language model as a classifier of texts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stillhouse.models.causal_lm import load_weights


class TextClassifier(nn.Module):
    """Tokens [B, T], padded by -1 at their end, to logits [B, num_classes].

    `classifier` reads the state of the last layer at the last token of each text. A causal model's
    tokens do not see those behind them, so that padding changes nothing.

    Args:
        body: the language model without its head, a transformers model.
        frozen: the body is in evaluation mode and is not trained.
    """

    def __init__(self, body: Any, num_classes: int, *, frozen: bool) -> None:
        super().__init__()
        self.body = body.requires_grad_(not frozen)
        self.frozen = frozen
        width = body.config.get_text_config().hidden_size
        self.classifier = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classifier.bias)
        nn.init.normal_(self.classifier.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        last = (tokens >= 0).sum(1) - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.body(tokens.clamp(min=0), use_cache=False).last_hidden_state
        return self.classifier(states[torch.arange(len(tokens), device=tokens.device), last])

    def train(self, mode: bool = True) -> "TextClassifier":
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self


def load_body(path: str) -> nn.Module:
    """A language model without its head, float32, on the CPU; errors as `load_weights`."""
    return load_weights(AutoModelForCausalLM, path, torch.float32).base_model


def empty_body(config: Mapping[str, Any]) -> nn.Module:
    """The same with random weights, from its configuration (`config_of`)."""
    made = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(made, dtype=torch.float32).base_model


def config_of(body: Any) -> dict[str, Any]:
    """The configuration of a language model, as JSON has it."""
    return body.config.to_dict()
