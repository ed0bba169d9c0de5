"""Masked language models, such as BERT: states of all positions, logits of a few.

Their heads differ by architecture: there are layers before the output embeddings. So the model's
own code makes the logits, from the states of the positions that are asked for.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.models.head import states_of_body


def is_masked_model(model: nn.Module) -> bool:
    """Whether it is a masked language model of transformers."""
    return type(model).__name__.endswith("ForMaskedLM")


def last_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The last hidden states [B, T, H] of tokens [B, T] without padding."""
    body: Any = model.base_model
    return body(input_ids=input_ids).last_hidden_state


def masked_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits float32 [n, V] of last hidden states [n, H]; all of them are in memory.

    Raises:
        ModelError: the architecture does not compute logits from the states of its body.
    """
    network: Any = model
    ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
    with states_of_body(network.base_model, hidden) as calls:
        logits = network(input_ids=ids).logits
    if not calls:
        raise ModelError(
            f"the architecture {model.config.model_type!r} makes its logits in a way that training "
            "does not know"
        )
    return logits[0].float()
