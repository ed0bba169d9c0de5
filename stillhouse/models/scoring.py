"""The scoring kernel: the loss of every predicted token, without ever holding all logits.

The body computes hidden states [B, T, H]; logits are made for some thousand positions at a time and
reduced at once to `logsumexp - target logit` in float32. All micro-batches have one size, the last
one padded with copies of its first row, so that a sequence's losses do not depend on its
neighbours. `benchmarks/kernel.py` measures it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from stillhouse.models.causal_lm import (
    Attention,
    choose_dtype,
    compile_layers,
    load_model,
    set_attention,
)
from stillhouse.models.device import choose_device, use_onednn_for_float32
from stillhouse.models.head import head_of, logit_rule, predicting, with_bos
from stillhouse.spec import ScoringSettings

_MICRO_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 16}
_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}  # 4 MB stay in a core's cache; 512 MB of a GPU
_MIN_CHUNK = 64


class ScoringModel:
    """Scores sequences with a causal language model, whose weights stay unchanged.

    Args:
        model: on its device, with its weights in float32 or bfloat16.
        dtype: of the body's products. The residual stream has the weights' type; logits and
            losses are float32.
        micro_batch: sequences a forward pass; default 2048 tokens on the CPU, 65536 on a GPU.
        compile: compile layers and losses with `torch.compile`, which takes seconds once.
        attention: see `set_attention`.
        bos_id: put before every sequence; the first token's loss is not counted all the same.

    Attributes:
        micro_batch: sequences a forward pass of the last call; None before the first.

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
        self._model, self._device, self._dtype = model, model.device, dtype
        self._attention: Attention = attention
        self._asked = micro_batch
        self.micro_batch: int | None = None
        self._body: Any = model.base_model
        self._head, self._bos_id = head_of(model, logit_rule(model)), bos_id
        self._nll: Any = token_losses
        if self._device.type == "cpu":
            use_onednn_for_float32()
        if compile:
            compile_layers(model)
            self._nll = torch.compile(token_losses, dynamic=False)

    def token_nll(self, input_ids: NDArray[Any]) -> NDArray[np.float32]:
        """NLL in nats: integers [N, T] -> float32 [N, T-1]; column t-1 belongs to position t.

        Raises:
            torch.OutOfMemoryError, MemoryError: a single sequence is too much.
        """
        if not len(input_ids):
            return np.empty((0, input_ids.shape[1] - 1), np.float32)
        [losses] = self.map_logits(input_ids, lambda logits, ids: [self._nll(logits, ids)])
        return losses

    def map_logits(
        self,
        input_ids: NDArray[Any],
        reduce: Callable[..., Sequence[Tensor]],
        *columns: NDArray[Any],
    ) -> list[NDArray[Any]]:
        """What `reduce` makes of the logits of every predicted token, as arrays [N, T-1, ...].

        Out of memory halves the micro-batch for good and starts this call over, so that all its
        rows are computed with one size.

        Args:
            input_ids: integers [N, T], N > 0.
            reduce: float32 logits [n, V], the tokens that they predict [n], and the columns' values
                [n, ...] -> tensors [n, ...]. It is called for some thousand positions at a time.
            columns: arrays [N, T-1, ...].

        Raises:
            torch.OutOfMemoryError, MemoryError: a single sequence is too much.
        """
        num_rows, length = input_ids.shape
        self._model.eval()
        set_attention(self._model, self._attention, length + int(self._bos_id is not None))
        size = self._asked or max(1, _MICRO_BATCH_TOKENS[self._device.type] // length)
        blocks: list[list[NDArray[Any]]] = []
        start = 0
        while start < num_rows:
            try:
                block, *values = (a[start : start + size] for a in (input_ids, *columns))
                made = self._reduced(block, values, size, reduce)
                blocks.append([array[: len(block)] for array in made])
                start += size
            except (torch.OutOfMemoryError, MemoryError):
                if size == 1:
                    raise
                size = self._asked = size // 2
                start, blocks = 0, []
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
        self.micro_batch = size
        return [np.concatenate(arrays) for arrays in zip(*blocks, strict=True)]

    @torch.inference_mode()
    def _reduced(
        self,
        block: NDArray[Any],
        columns: Sequence[NDArray[Any]],
        size: int,
        reduce: Callable[..., Sequence[Tensor]],
    ) -> list[NDArray[Any]]:
        rows = np.arange(size)
        rows[len(block) :] = 0
        ids = torch.from_numpy(block[rows].astype(np.int64)).to(self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            given = with_bos(ids, self._bos_id)
            hidden = self._body(input_ids=given, use_cache=False).last_hidden_state
        hidden = predicting(hidden, ids.shape[1])
        targets = ids[:, 1:].reshape(-1)
        chunk = max(_MIN_CHUNK, _CHUNK_LOGITS[self._device.type] // len(self._head.weight))
        count = -(-len(targets) // chunk)  # of equal length: at most two shapes to compile
        beside = [torch.from_numpy(c[rows]).to(self._device).flatten(0, 1) for c in columns]
        chunks = [values.chunk(count) for values in (hidden, targets, *beside)]
        parts = [
            reduce(self._head.logits(states), *values)
            for states, *values in zip(*chunks, strict=True)
        ]
        return [
            torch.cat(tensors).unflatten(0, (size, -1)).cpu().numpy()
            for tensors in zip(*parts, strict=True)
        ]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL in nats of float32 logits [n, V] and targets [n]: `logsumexp - target logit`."""
    if not torch.compiler.is_compiling():  # faster in eager mode; compiled it takes two passes
        return cross_entropy(logits, targets, reduction="none")
    return logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]


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
    return ScoringModel(
        load_model(path, dtype=settings.dtype if on_gpu else "float32", device=place),
        dtype=choose_dtype(settings.dtype, place),
        micro_batch=settings.micro_batch,
        compile=settings.compile == "on" or (settings.compile == "auto" and on_gpu),
        attention=settings.attention,
        bos_id=bos_id,
    )
