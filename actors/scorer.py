"""Scorers as pool workers host them: a language model, statistics of text, or a user's class."""

from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.selection.contamination import NgramIndex
from stillhouse.selection.own import OwnCode, OwnTokenScorer
from stillhouse.selection.scorers import (
    ContaminationScorer,
    DsirScorer,
    LanguageModelScorer,
    Scorer,
)
from stillhouse.spec import ScoringSettings
from stillhouse.storage.artifact import Store

Kind = Literal["causal_lm", "dsir", "contamination", "own"]


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """A user's scorer: its code, its settings, and what the selection chooses."""

    code: OwnCode
    settings: dict[str, Any]
    grain: str


@dataclass(frozen=True, slots=True)
class ScorerSettings:
    """What a scorer is built from: small plain values, so that a new worker needs nothing else.

    `path` is the folder of the model (or of the n-gram statistics) in the store.
    """

    kind: Kind
    path: str
    tokenizer: str
    eos_token: str
    scoring: ScoringSettings
    device: str
    gpus: float
    threads: int
    own: OwnPlace | None = None
    bos_id: int | None = None

    def build(self, store: Store) -> Scorer:
        """Load the model and make the scorer."""
        if self.kind == "causal_lm":
            return self._language_model()
        from stillhouse.selection.statistics import load_arrays
        from stillhouse.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer, self.eos_token)
        arrays = load_arrays(self.path)
        if self.own is not None:
            own = self.own
            return OwnTokenScorer(own.code, own.settings, arrays, tokenizer, own.grain)
        if self.kind == "dsir":
            return DsirScorer(arrays["values"], tokenizer)
        return ContaminationScorer(NgramIndex(arrays["values"]), tokenizer)

    def _language_model(self) -> Scorer:
        from stillhouse.models.causal_lm import choose_device, choose_dtype
        from stillhouse.models.device import device_name
        from stillhouse.models.scoring import load_scoring_model

        device = choose_device(self.device, self.gpus)
        model = load_scoring_model(
            self.path,
            self.scoring,
            device=self.device,
            gpus=self.gpus,
            threads=self.threads,
            bos_id=self.bos_id,
        )
        dtype = str(choose_dtype(self.scoring.dtype, device)).removeprefix("torch.")
        return LanguageModelScorer(model, device_name(device), dtype)
