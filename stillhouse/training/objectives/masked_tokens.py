"""The loss of masked language models (Devlin et al. 2019, section 3.1).

    objective = mean over the chosen tokens of -log p(token | what is left of its sequence)

Which tokens are chosen and what stands in their place: `stillhouse.training.hiding`. Sequences are
packed, as for causal models; the tokenizer's CLS token stands before each of them, if its own
post-processor puts one there (`bos_id`).

    init: {path: BERT}
    train.objective: {name: masked_tokens, rate: 0.15}
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stillhouse.errors import SpecError
from stillhouse.models.head import with_bos
from stillhouse.models.masked_lm import last_states, masked_logits
from stillhouse.text.pieces import LOSS_MASK
from stillhouse.training.hiding import GIVEN, Hiding
from stillhouse.training.objectives import LossValue, ObjectiveFacts


class MaskedTokens:
    """Cross-entropy in float32 of the tokens that `hiding` chose, EOS included; `rate` is their
    share. Logits are made of these alone.

    Raises:
        SpecError: the model is not masked, or the rate is not between 0 and 1.
    """

    signals: ClassVar[tuple[str, ...]] = (LOSS_MASK,)

    def __init__(self, facts: ObjectiveFacts, rate: float = 0.15) -> None:
        if facts.mask_id is None or facts.vocab_size is None:
            raise SpecError(
                "`train.objective: masked_tokens` needs a masked language model as `init`"
            )
        self._bos_id = facts.bos_id
        self.hiding = Hiding(facts.mask_id, facts.vocab_size, rate)

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Tensor]
    ) -> LossValue:
        """See `Objective`. `token_nll` is 0 at tokens that were not chosen."""
        if GIVEN in signals:
            given, chosen = signals[GIVEN], signals[LOSS_MASK]
        else:
            given, chosen = self.hiding.held_out(input_ids)
        states = last_states(model, with_bos(given, self._bos_id))[:, -input_ids.shape[1] :]
        at = chosen > 0
        with torch.autocast(states.device.type, enabled=False):  # logits are not rounded
            logits = masked_logits(model, states[at].float())
        nll = cross_entropy(logits, input_ids[at], reduction="none")
        mean = nll.sum() / max(1, len(nll))
        token_nll = torch.zeros_like(chosen).masked_scatter(at, nll.detach())
        return LossValue(mean, mean.detach(), token_nll[:, 1:])
