"""From a causal model's hidden states to its logits.

    logits = soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)

Scale and soft cap come from the configuration, and are checked against the logits that the
architecture's own code computes: a model that does anything else is refused.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from stillhouse.errors import ModelError

_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)  # of Granite; HyperCLOVA X multiplies by what is called the same
_PROBE_SIZES = (0.0, 0.1, 1.0, 10.0, 100.0)  # logits: the first shows a bias, the last ones a cap


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What an architecture does after the product of hidden states and output embeddings."""

    scale: float = 1.0
    soft_cap: float | None = None

    def apply(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.soft_cap is None else (logits / self.soft_cap).tanh() * self.soft_cap

    def product_gradient(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Backward of `apply`: the gradient at the product, from the one at the logits."""
        if self.soft_cap is not None:
            gradient = gradient * (1 - (logits / self.soft_cap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


PLAIN = LogitRule()


class Head(NamedTuple):
    """The output layer of a causal model: `weight` [V, H], `bias` [V] or None, and its rule."""

    weight: Tensor
    bias: Tensor | None = None
    rule: LogitRule = PLAIN

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, H] of any floating type -> float32 [n, V].

        Products are accumulated in float32 and never rounded to bfloat16, which would cost 1e-2
        nats a token.
        """
        weight = self.weight
        if weight.dtype == torch.bfloat16 and weight.is_cuda:
            logits = torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        else:
            logits = linear(hidden.float(), weight.float())
        if self.bias is not None:
            logits = logits + self.bias.float()
        return self.rule.apply(logits)


def with_bos(input_ids: Tensor, bos_id: int | None) -> Tensor:
    """Sequences [B, T], after a beginning-of-sequence token if there is one: [B, T or T+1]."""
    if bos_id is None:
        return input_ids
    return torch.cat([input_ids.new_full((len(input_ids), 1), bos_id), input_ids], dim=1)


def predicting(hidden: Tensor, length: int) -> Tensor:
    """The hidden states [B, T or T+1, H] that predict tokens 1 .. T-1: [B * (T-1), H]."""
    return hidden[:, -length:-1].flatten(0, 1)


def head_of(model: PreTrainedModel, rule: LogitRule) -> Head:
    """The head with the model's current weights; `rule` from `logit_rule`."""
    embeddings: Any = model.get_output_embeddings()
    return Head(embeddings.weight, embeddings.bias, rule)


def logit_rule(model: PreTrainedModel) -> LogitRule:
    """The rule of the model's architecture, from its configuration and its code.

    The model's forward is run with random hidden states in place of the body and small output
    embeddings, in float32: weights are not read, so a model on `meta` will do.

    Raises:
        ModelError: no rule gives the logits that the code computes.
    """
    embeddings, kind = model.get_output_embeddings(), model.config.model_type
    if not isinstance(embeddings, nn.Linear):
        raise ModelError(f"the architecture {kind!r} has no output embeddings to score with")
    generator, width = torch.Generator().manual_seed(0), embeddings.in_features
    small = nn.Linear(width, 16, bias=embeddings.bias is not None)  # pyright: ignore[reportUnnecessaryComparison]
    sizes = torch.tensor(_PROBE_SIZES)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.normal_(generator=generator)
        hidden = torch.randn(len(sizes), width, generator=generator)
        hidden = hidden * (sizes / linear(hidden, small.weight).std(1).clamp(min=1e-6))[:, None]
        found = _own_logits(model, small, hidden)
        if found is not None:
            config: Any = model.config.get_text_config()
            caps = [None, *_values(config, _CAPS)]
            scales = [1.0, *_values(config, _FACTORS)]
            scales += [1 / divisor for divisor in _values(config, _DIVISORS)]
            for cap, scale in product(caps, scales):
                rule = LogitRule(scale, cap)
                logits = Head(small.weight, small.bias, rule).logits(hidden)
                if torch.allclose(logits, found, rtol=1e-4, atol=1e-5):
                    return rule
    raise ModelError(
        f"the architecture {kind!r} makes its logits in a way that scoring and training do not "
        "know (neither a bias, a scale nor a soft cap of its configuration)"
    )


def _values(config: Any, names: tuple[str, ...]) -> list[float]:
    found = [getattr(config, name, None) for name in names]
    return [float(value) for value in found if isinstance(value, int | float) and value]


class _Hidden:
    """A body's output with hidden states only."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]


def _own_logits(model: PreTrainedModel, small: nn.Module, hidden: Tensor) -> Tensor | None:
    """The logits [n, v] that the model's code computes from hidden states [n, H]; None: unknown.

    The body's states are replaced. Some architectures (OPT) call its inner part directly: then the
    outer part must return the inner one's output unchanged.
    """
    network: Any = model
    ids = torch.zeros((1, len(hidden)), dtype=torch.long)
    for part in (network.base_model, network.get_decoder()):
        with _stub(network, small, part, hidden) as calls:
            try:
                logits = network(input_ids=ids, use_cache=False).logits
                if part is not network.base_model:
                    outer = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
                    if not torch.equal(outer, hidden[None]):
                        return None
            except Exception:  # the code calls another part, or needs a real body
                continue
        if calls:
            return logits[0].float()
    return None


@contextmanager
def _stub(network: Any, small: nn.Module, body: nn.Module, hidden: Tensor) -> Generator[list[bool]]:
    """Replace a model's output embeddings and body; yields a list that grows with each call."""
    head = network.get_output_embeddings()
    network.set_output_embeddings(small)
    try:
        with states_of_body(body, hidden) as calls:
            yield calls
    finally:
        network.set_output_embeddings(head)


@contextmanager
def states_of_body(body: nn.Module, hidden: Tensor) -> Generator[list[bool]]:
    """Replace what a body computes by states [n, H] of one sequence; yields a list that grows with
    each call.
    """
    calls = list[bool]()

    def forward(*_: Any, **__: Any) -> _Hidden:
        calls.append(True)
        return _Hidden(hidden[None])

    body.forward = forward
    try:
        yield calls
    finally:
        del body.forward
