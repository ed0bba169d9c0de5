"""A scorer that is not ours: scikit-learn's logistic regression on hashed character n-grams.

In a spec, run in this folder (or with it on PYTHONPATH):

    scorer: {import: "hashed_ngrams:HashedNgrams", settings: {ngram: 4}}

Any class with these three methods is a scorer. It sees texts, never tokens or files.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression


class HashedNgrams:
    """Log odds that a text is of the target rather than of the pool."""

    def __init__(self, ngram: int = 4, num_features: int = 2**16, max_texts: int = 50_000) -> None:
        self._max_texts = max_texts
        self._vectorizer = HashingVectorizer(
            analyzer="char_wb", ngram_range=(1, ngram), n_features=num_features
        )

    def fit(self, target: Iterable[str], pool: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Learn to tell documents of the target from random sequences of the pool."""
        wanted = list(islice(target, self._max_texts))
        others = list(islice(pool, self._max_texts))
        features = self._vectorizer.transform(wanted + others)
        labels = np.repeat([1, 0], [len(wanted), len(others)])
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        model.fit(features, labels)
        return {"weights": model.coef_[0], "bias": model.intercept_}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take the weights over."""
        self._weights, self._bias = state["weights"], float(state["bias"][0])

    def score(self, texts: list[str]) -> NDArray[np.float64]:
        """Log odds [n]."""
        return self._vectorizer.transform(texts) @ self._weights + self._bias
