"""A causal language model in this process that answers in batches.

Every batch has one number of rows and one width, a multiple of 32 tokens: it is padded on the left,
and filled with copies of its first row. Each row draws with its own seed, by the Gumbel-max trick
on float32 logits. So an answer depends on its call, and not on what stands beside it in the batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.generation.asking import Answer, Ask
from stillhouse.models.causal_lm import choose_dtype, load_model
from stillhouse.models.device import choose_device
from stillhouse.models.scoring import ScoringModel
from stillhouse.text.chat import prompt_text
from stillhouse.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stillhouse.generation.task import LocalModelSettings

_WIDTH = 32
_ROWS = {"cpu": 16, "cuda": 64}


class LocalModel:
    """Answers calls with a model that it loads."""

    in_flight: int | None = None

    def __init__(self, settings: "LocalModelSettings") -> None:
        self._settings = settings
        self._device = choose_device(settings.device, settings.gpus)
        on_gpu = self._device.type == "cuda"
        if not on_gpu:
            torch.set_num_threads(settings.threads)
        dtype = settings.scoring.dtype
        self._model: PreTrainedModel = load_model(
            settings.folder, dtype=dtype if on_gpu else "float32", device=self._device
        ).eval()
        self._tokenizer = load_tokenizer(settings.tokenizer, settings.eos_token)
        self._scoring = ScoringModel(
            self._model,
            dtype=choose_dtype(dtype, self._device),
            micro_batch=settings.scoring.micro_batch or _ROWS[self._device.type],
        )
        self._rows = settings.scoring.micro_batch or _ROWS[self._device.type]

    @property
    def identity(self) -> list[Any]:
        return self._settings.identity

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers of calls; those of one width and one limit are computed together."""
        answers: list[Answer | None] = [None] * len(asks)
        groups: defaultdict[tuple[Any, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for i, ask in enumerate(asks):
            ids, more = self._prompt(ask), self._ids(ask.given or "")
            new = ask.max_tokens if ask.given is None else len(more)
            if len(ids) + new > self._settings.max_positions:
                answers[i] = Answer(
                    fault=f"longer than the context of {self._settings.max_positions:,} tokens"
                )
            elif ask.given is None:
                width = -(-len(ids) // _WIDTH) * _WIDTH
                limit = min(ask.max_tokens, self._settings.max_positions - width)
                if limit < ask.max_tokens:
                    width, limit = len(ids), ask.max_tokens
                groups["write", width, limit, ask.temperature].append((i, ids))
            elif more:
                width = -(-(len(ids) + len(more)) // _WIDTH) * _WIDTH
                groups["score", min(width, self._settings.max_positions)].append((i, ids + more))
            else:
                answers[i] = Answer(prompt_tokens=len(ids))
        for (kind, width, *rest), members in groups.items():
            for start in range(0, len(members), self._rows):
                block = members[start : start + self._rows]
                of = [asks[i] for i, _ in block]
                prompts = [ids for _, ids in block]
                if kind == "write":
                    made = self._write(prompts, of, width, *rest)
                else:
                    made = self._score(prompts, of, width)
                for (i, _), answer in zip(block, made, strict=True):
                    answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _prompt(self, ask: Ask) -> list[int]:
        """The ids of a prompt as the model reads it, up to where the assistant speaks."""
        one = self._tokenizer
        special = {"bos_token": one.bos_token or "", "eos_token": one.eos_token}
        text = prompt_text(ask.prompt, one.chat_template, special)
        if self._settings.bos_id is not None:
            text = text.removeprefix(one.bos_token or "")
        start = [] if self._settings.bos_id is None else [self._settings.bos_id]
        return start + self._ids(text, special=one.chat_template is not None)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        backend = self._tokenizer.backend
        backend.encode_special_tokens = not special
        try:
            return backend.encode(text, add_special_tokens=False).ids
        finally:
            backend.encode_special_tokens = True

    @torch.inference_mode()
    def _write(
        self,
        prompts: Sequence[list[int]],
        asks: Sequence[Ask],
        width: int,
        limit: int,
        temperature: float,
    ) -> list[Answer]:
        rows = [*range(len(prompts)), *[0] * (self._rows - len(prompts))]
        ids = np.full((len(rows), width), self._tokenizer.eos_id, np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(rows):
            ids[row, width - len(prompts[i]) :] = prompts[i]
            mask[row, width - len(prompts[i]) :] = 1
        noise = _Noise([asks[i].seed for i in rows], temperature, self._tokenizer.vocab_size)
        model: Any = self._model
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        made: Tensor = model.generate(
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(mask).to(self._device),
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            logits_processor=[noise],
            eos_token_id=self._stops,
            pad_token_id=self._tokenizer.eos_id,
        )
        answers: list[Answer] = []
        for prompt, found in zip(prompts, made[:, width:].tolist(), strict=False):
            end = next((n for n, token in enumerate(found) if token in self._stops), None)
            text = self._text(found[:end])
            count = len(found) if end is None else end + 1
            answers.append(Answer(text, end is not None, None, len(prompt), count))
        return answers

    @property
    def _stops(self) -> list[int]:
        """Ids that end an answer: the tokenizer's and the configuration's."""
        named: Any = self._model.config.get_text_config().eos_token_id
        more = named if isinstance(named, list) else [named]
        return sorted({self._tokenizer.eos_id, *(one for one in more if one is not None)})

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.backend.decode([*ids], skip_special_tokens=True)
        return text.strip()

    def _score(
        self, sequences: Sequence[list[int]], asks: Sequence[Ask], width: int
    ) -> list[Answer]:
        """Mean log-likelihoods of the ends of sequences, which are padded on the right."""
        ids = np.full((len(sequences), width), self._tokenizer.eos_id, np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
        losses = self._scoring.token_nll(ids)
        answers: list[Answer] = []
        for row, (sequence, ask) in enumerate(zip(sequences, asks, strict=True)):
            count = len(self._ids(ask.given or ""))
            found = losses[row, len(sequence) - 1 - count : len(sequence) - 1]
            score = -float(found.astype(np.float64).mean())
            if not np.isfinite(score):
                raise ModelError(f"the model {self._settings.folder} gives NaN")
            answers.append(Answer("", True, score, len(sequence), 0))
        return answers


class _Noise(LogitsProcessor):
    """Makes the likeliest token one that was drawn: adds Gumbel noise of each row's own seed."""

    def __init__(self, seeds: Sequence[int], temperature: float, vocab_size: int) -> None:
        self._draws = [np.random.default_rng([seed & 0xFFFFFFFFFFFF]) for seed in seeds]
        self._temperature, self._vocab_size = temperature, vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [n, V] of the next token -> the same with noise; padding of the vocabulary out."""
        scores = scores.float()
        scores[:, self._vocab_size :] = -torch.inf
        if self._temperature == 0:
            return scores
        uniform = np.stack([draws.random(self._vocab_size) for draws in self._draws])
        noise = -np.log(-np.log(np.maximum(uniform, 1e-300)))
        scores[:, : self._vocab_size] /= self._temperature
        scores[:, : self._vocab_size] += torch.from_numpy(noise).to(scores)
        return scores
