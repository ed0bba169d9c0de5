"""The scoring kernel: the loss of every predicted token, without ever holding all logits.

The body gives hidden states [B, T, H]; logits are made for some thousand positions at a time and
reduced at once to `logsumexp - target logit` in float32. Micro-batches have one fixed size, the
last one filled up with copies of its first row, so that a sequence's losses do not depend on who
scores it. Compiled, each layer and the reduction are one graph each: seconds, where a graph of the
whole model takes many. Measured in `benchmarks/kernel.py`.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stillhouse.models.attention import Attention, set_attention
from stillhouse.models.causal_lm import choose_device, choose_dtype, load_model
from stillhouse.models.cpu import use_onednn_for_float32
from stillhouse.models.head import head_of, logit_rule, predicting, with_bos
from stillhouse.spec import ScoringSettings

_MICRO_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 16}
_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}  # 4 MB stay in a core's cache; 512 MB of a GPU
_MIN_CHUNK = 64


class ScoringModel:
    """Scores sequences with a causal language model. The model's weights are left as they are.

    Args:
        model: on its device, with its weights in float32 or bfloat16.
        dtype: of the body's products. The residual stream has the weights' type, logits and
            losses are float32.
        micro_batch: sequences a forward pass; None: 2048 tokens on the CPU, 65536 on a GPU.
        compile: compile layers and losses with `torch.compile`: seconds once, quicker afterwards.
        attention: of the body (`set_attention`).
        bos_id: stands before every sequence; its own loss and that of the first token are not
            counted.

    Raises:
        ModelError: as `logit_rule`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        micro_batch: int | None = None,
        compile: bool = False,
        attention: Attention = "auto",
        bos_id: int | None = None,
    ) -> None:
        self._model = model
        self._device = model.device
        self._dtype = dtype
        self._attention: Attention = attention
        self._micro_batch = micro_batch
        self._used: int | None = None
        self._body: Any = model.base_model
        self._head = head_of(model, logit_rule(model))
        self._bos_id = bos_id
        self._nll: Any = token_losses
        if self._device.type == "cpu":
            use_onednn_for_float32()
        if compile:
            compile_layers(model)
            self._nll = torch.compile(token_losses, dynamic=False)

    def token_nll(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """NLL in nats: integers [N, T] -> float32 [N, T-1]; column t-1 belongs to position t.

        Out of memory halves the micro-batch, for all rows of this call and for later ones: what is
        scored together has the bytes of one size.

        Raises:
            torch.OutOfMemoryError, MemoryError: a single sequence is too much.
        """
        num_rows, length = input_ids.shape
        self._model.eval()
        set_attention(self._model, self._attention, length + int(self._bos_id is not None))
        size = self._micro_batch or self._default_micro_batch(length)
        losses = np.empty((num_rows, length - 1), np.float32)
        start = 0
        while start < num_rows:
            try:
                block = input_ids[start : start + size]
                losses[start : start + size] = self._micro_batch_nll(block, size)[: len(block)]
                start += size
            except (torch.OutOfMemoryError, MemoryError):
                if size == 1:
                    raise
                size = self._micro_batch = size // 2
                start = 0
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
        self._used = size
        return losses

    @property
    def micro_batch(self) -> int | None:
        """Sequences a forward pass of the last call."""
        return self._used

    def _default_micro_batch(self, length: int) -> int:
        return max(1, _MICRO_BATCH_TOKENS[self._device.type] // length)

    @torch.inference_mode()
    def _micro_batch_nll(self, block: NDArray[Any], size: int) -> NDArray[np.float32]:
        rows = np.arange(size)
        rows[len(block) :] = 0
        ids = torch.from_numpy(block[rows].astype(np.int64)).to(self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            given = with_bos(ids, self._bos_id)
            hidden = self._body(input_ids=given, use_cache=False).last_hidden_state
        hidden = predicting(hidden, ids.shape[1])
        targets = ids[:, 1:].reshape(-1)
        chunk = max(_MIN_CHUNK, _CHUNK_LOGITS[self._device.type] // len(self._head.weight))
        count = -(-len(targets) // chunk)  # of equal length: one or two shapes to compile
        parts = [
            self._nll(self._head.logits(h), y)
            for h, y in zip(hidden.chunk(count), targets.chunk(count), strict=True)
        ]
        return torch.cat(parts).view(size, -1).cpu().numpy()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL in nats of float32 logits [n, V] and targets [n]: `logsumexp - target logit`."""
    if not torch.compiler.is_compiling():  # quicker there; compiled, it would be two passes
        return cross_entropy(logits, targets, reduction="none")
    return logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each of a model's layers in place, for fixed shapes."""
    for layer in layers_of(model):
        layer.compile(dynamic=False)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a transformers model: its first list of modules."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def load_scoring_model(
    path: str,
    settings: ScoringSettings,
    *,
    device: str,
    gpus: float,
    threads: int,
    bos_id: int | None = None,
) -> ScoringModel:
    """Load a model to score with; on the CPU, this process's torch threads are set.

    Raises:
        ModelError: as `load_model` and `logit_rule`.
        SpecError: as `choose_device`.
    """
    place = choose_device(device, gpus)
    on_gpu = place.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(threads)
    dtype = choose_dtype(settings.dtype, place)
    model = load_model(
        path,
        dtype=settings.dtype if on_gpu else "float32",
        device=place,
    )
    return ScoringModel(
        model,
        dtype=dtype,
        micro_batch=settings.micro_batch,
        compile=settings.compile == "on" or (settings.compile == "auto" and on_gpu),
        attention=settings.attention,
        bos_id=bos_id,
    )
