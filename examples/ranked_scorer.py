"""A cheap scorer that orders texts as two language models do, which score a sample of the pool.

In a spec, run in this folder (or with it on PYTHONPATH):

    scorer: {import: "ranked_scorer:RankedScorer", settings: {prior: MODEL, conditional: MODEL}}

The value of a text is CoLoR-Filter's: its loss under the prior minus that under the conditional.
Only a sample is scored by the models. A linear head on hashed character n-grams learns the order
of its values, pair by pair (`ranking_loss`), and scores all of the pool.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer
from transformers import AutoModelForCausalLM

from stillhouse.errors import InputError
from stillhouse.text.tokenizer import load_tokenizer
from stillhouse.training.objectives.small_losses import ranking_loss


class RankedScorer:
    """Models are folders or hub names, the tokenizer by default the one beside the prior."""

    def __init__(
        self,
        prior: str,
        conditional: str,
        tokenizer: str | None = None,
        num_features: int = 2**14,
        max_texts: int = 4096,
        num_tokens: int = 512,
        num_steps: int = 400,
    ) -> None:
        self._models, self._tokenizer = (prior, conditional), tokenizer or prior
        self._max_texts, self._num_tokens, self._num_steps = max_texts, num_tokens, num_steps
        ngrams = {"analyzer": "char_wb", "ngram_range": (1, 4)}
        self._vectorizer = HashingVectorizer(**ngrams, n_features=num_features)

    def fit(self, target: Iterable[str], pool: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Score a sample of the pool by both models, learn its order; `target` is not read."""
        encode = load_tokenizer(self._tokenizer).encode_batch
        texts = [text for text in islice(pool, self._max_texts) if text]
        ids = [tokens[: self._num_tokens].astype(np.int64) for tokens in encode(texts)]
        pairs = [(t, i) for t, i in zip(texts, ids, strict=True) if len(i) > 1]  # 1 has no loss
        if len(pairs) < 2:
            raise InputError("the pool's sample has no two texts to compare")
        prior, own = (self._losses(path, [i for _, i in pairs]) for path in self._models)
        features = self._vectorizer.transform([text for text, _ in pairs])
        weights = torch.zeros(features.shape[1], requires_grad=True)
        optimiser, rng = torch.optim.Adam([weights], lr=0.05), np.random.default_rng(0)
        for _ in range(self._num_steps):
            drawn = rng.choice(len(pairs), min(64, len(pairs)), replace=False)
            scores = torch.from_numpy(features[drawn].toarray()).float() @ weights
            optimiser.zero_grad()
            ranking_loss(scores[None], (prior - own)[drawn][None]).backward()
            optimiser.step()
        return {"weights": weights.detach().numpy()}

    @torch.inference_mode()
    def _losses(self, path: str, ids: list[NDArray[np.int64]]) -> torch.Tensor:
        """Mean NLL of each text [n], read one by one: nothing is padded."""
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        rows = (torch.from_numpy(tokens)[None] for tokens in ids)
        return torch.stack([model(input_ids=row, labels=row).loss for row in rows])

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `fit` returned."""
        self._weights = state["weights"]

    def score(self, texts: list[str]) -> NDArray[Any]:
        """Scores [n]."""
        return self._vectorizer.transform(texts) @ self._weights
