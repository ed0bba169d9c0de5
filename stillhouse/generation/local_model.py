"""A causal language model in this process that answers in batches.

Every batch has one number of rows and one width, a multiple of 32 tokens: it is padded on the left,
and filled with copies of its first row. Each row draws with its own seed, by the Gumbel-max trick
on float32 logits. So an answer depends on its call, and not on what stands beside it in the batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.generation.asking import Answer, Ask
from stillhouse.generation.model_settings import LocalModelSettings
from stillhouse.models.causal_lm import choose_dtype, load_model
from stillhouse.models.device import choose_device
from stillhouse.models.scoring import ScoringModel
from stillhouse.text.chat import prompt_text
from stillhouse.text.tokenizer import load_tokenizer

_WIDTH = 32
_ROWS = {"cpu": 16, "cuda": 64}


class LocalModel:
    """Answers calls with a model that it loads."""

    in_flight: int | None = None

    def __init__(self, settings: LocalModelSettings) -> None:
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
        groups: defaultdict[tuple[Any, ...], list[tuple[int, Prompt]]] = defaultdict(list)
        most = self._settings.max_positions
        for i, ask in enumerate(asks):
            try:
                prompt = self._prompt(ask) if ask.given is None else self._given(ask)
            except ValueError as error:
                answers[i] = Answer(fault=str(error))
                continue
            size = len(prompt.ids)
            width = -(-size // _WIDTH) * _WIDTH
            if size + (ask.max_tokens if ask.given is None else 0) > most:
                answers[i] = Answer(fault=f"longer than the context of {most:,} tokens")
            elif ask.given is not None:
                groups["score", min(width, most)].append((i, prompt))
            else:
                width = width if width + ask.max_tokens <= most else size
                groups["write", width, ask.max_tokens, ask.temperature].append((i, prompt))
        for (kind, width, *rest), members in groups.items():
            prompts = [prompt for _, prompt in members]
            if kind == "score":
                made = self._score(prompts, width)
            else:
                made = self._written(prompts, [asks[i].seed for i, _ in members], width, *rest)
            for (i, _), answer in zip(members, made, strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _prompt(self, ask: Ask) -> "Prompt":
        """A prompt as the model reads it, up to where the assistant speaks.

        The space at the end of a turn's plain form is part of the answer's first word.
        """
        one, bos = self._tokenizer, self._settings.bos_id
        special = {"bos_token": one.bos_token or "", "eos_token": one.eos_token}
        text = prompt_text(ask.prompt, one.chat_template, special)
        if one.chat_template is None:
            text = text.rstrip(" ")
        if bos is not None:
            text = text.removeprefix(one.bos_token or "")
        one.backend.encode_special_tokens = one.chat_template is None
        try:
            ids = one.backend.encode(text, add_special_tokens=False).ids
        finally:
            one.backend.encode_special_tokens = True
        return Prompt([*([] if bos is None else [bos]), *ids])

    def _given(self, ask: Ask) -> "Prompt":
        """A prompt with a given answer, whose tokens count as they do in training."""
        turns = [("user", ask.prompt), ("assistant", ask.given or "")]
        ids, counted = self._tokenizer.encode_chat(
            [{"role": role, "content": content} for role, content in turns]
        )
        ended = [self._tokenizer.eos_id] if counted[-1] else []
        mask, bos = counted[: len(ids) + len(ended)], self._settings.bos_id
        if bos is None:
            return Prompt([*ids.tolist(), *ended], mask)
        return Prompt([bos, *ids.tolist(), *ended], np.append(np.zeros(1, np.uint8), mask))

    def _written(
        self, prompts: "Sequence[Prompt]", seeds: Sequence[int], width: int, *rest: Any
    ) -> list[Answer]:
        """Write in batches; out of memory halves them for good, and starts this call over.

        Raises:
            ModelError: a single answer is too much.
        """
        while True:
            step, made = self._rows, list[Answer]()
            try:
                for start in range(0, len(prompts), step):
                    stop = start + step
                    made += self._write(prompts[start:stop], seeds[start:stop], width, *rest)
                return made
            except (torch.OutOfMemoryError, MemoryError):
                if step == 1:
                    raise ModelError(
                        f"out of memory: an answer of {rest[0]:,} tokens after {width:,} does not "
                        "fit beside the models: lower `generation.max_tokens`, or give generators "
                        "more GPUs"
                    ) from None
                self._rows = step // 2
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    @torch.inference_mode()
    def _write(
        self,
        prompts: "Sequence[Prompt]",
        seeds: Sequence[int],
        width: int,
        limit: int,
        temperature: float,
    ) -> list[Answer]:
        rows = [*range(len(prompts)), *[0] * (self._rows - len(prompts))]
        ids = np.full((len(rows), width), self._tokenizer.eos_id, np.int64)
        mask = np.zeros_like(ids)
        for row, i in enumerate(rows):
            ids[row, width - len(prompts[i].ids) :] = prompts[i].ids
            mask[row, width - len(prompts[i].ids) :] = 1
        noise = _Noise([seeds[i] for i in rows], temperature, self._tokenizer.vocab_size)
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
            answers.append(Answer(text, end is not None, None, len(prompt.ids), count))
        return answers

    @property
    def _stops(self) -> list[int]:
        """Ids that end an answer: the tokenizer's, the configuration's, and those of generation."""
        named: Any = self._model.config.get_text_config().eos_token_id
        more = named if isinstance(named, list) else [named]
        named_here = (one for one in more if one is not None)
        return sorted({self._tokenizer.eos_id, *self._settings.stops, *named_here})

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.backend.decode([*ids], skip_special_tokens=True)
        return text.strip()

    def _score(self, prompts: "Sequence[Prompt]", width: int) -> list[Answer]:
        """Mean log-likelihoods of the counted tokens of sequences, which are padded on the right.

        Raises:
            ModelError: one is not finite.
        """
        ids = np.full((len(prompts), width), self._tokenizer.eos_id, np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = prompt.ids
        losses = self._scoring.token_nll(ids)
        answers: list[Answer] = []
        for prompt, found in zip(prompts, losses, strict=True):
            assert prompt.counted is not None
            chosen = found[: len(prompt.ids) - 1][prompt.counted[1:] > 0].astype(np.float64)
            if not len(chosen):
                answers.append(Answer(prompt_tokens=len(prompt.ids)))
                continue
            score = -float(chosen.mean())
            if not np.isfinite(score):
                raise ModelError(f"the model {self._settings.folder} gives NaN")
            answers.append(Answer("", True, score, len(prompt.ids), 0))
        return answers


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids [n]; with a given answer, which of them count [n]."""

    ids: list[int]
    counted: NDArray[np.uint8] | None = None


class _Noise(LogitsProcessor):
    """Makes the likeliest token one that was drawn: adds Gumbel noise of each row's own seed.

    On the CPU by NumPy's generator, on a GPU by the device's.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, vocab_size: int) -> None:
        self._seeds = [seed & 0xFFFFFFFFFFFF for seed in seeds]
        self._draws, self._on_device = list[np.random.Generator](), list[torch.Generator]()
        self._temperature, self._vocab_size = temperature, vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [n, V] of the next token -> the same with noise; padding of the vocabulary out."""
        scores = scores.float()
        scores[:, self._vocab_size :] = -torch.inf
        if self._temperature > 0:
            uniform = self._uniform(scores.device).clamp_min(1e-300)
            scores[:, : self._vocab_size] /= self._temperature
            scores[:, : self._vocab_size] -= (-uniform.log()).log().to(scores.dtype)
        return scores

    def _uniform(self, device: torch.device) -> Tensor:
        """Numbers in [0, 1) of every row: float64 [n, V]."""
        if device.type == "cpu":
            self._draws = self._draws or [np.random.default_rng([seed]) for seed in self._seeds]
            drawn = np.stack([draws.random(self._vocab_size) for draws in self._draws])
            return torch.from_numpy(drawn)
        if not self._on_device:
            self._on_device = [torch.Generator(device).manual_seed(one) for one in self._seeds]
        size, kind = (self._vocab_size,), torch.float64
        rows = [torch.rand(size, generator=g, device=device, dtype=kind) for g in self._on_device]
        return torch.stack(rows)
