"""The Scorer actor hosts one scorer and runs it over token parts, one read ahead."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from stillhouse.selection.contamination import NgramIndex
from stillhouse.selection.own import OwnCode, OwnTokenScorer
from stillhouse.selection.scorers import (
    ContaminationScorer,
    DsirScorer,
    LanguageModelScorer,
    Scorer,
    ScoreTask,
    read_tokens,
    score_part,
)
from stillhouse.spec import ScoringSettings
from stillhouse.storage.artifact import Receipt, Store, libraries

Kind = Literal["causal_lm", "dsir", "contamination", "own"]


@dataclass(frozen=True, slots=True)
class OwnPlace:
    """A user's scorer: its code, its settings, and what the selection chooses."""

    code: OwnCode
    settings: dict[str, Any]
    grain: str


@dataclass(frozen=True, slots=True)
class ScorerSettings:
    """What a Scorer actor is made from: small plain values, so that a restart needs nothing else.

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

    def build(self) -> Scorer:
        """Load the model and make the scorer."""
        if self.kind == "causal_lm":
            from stillhouse.models.scoring import load_scoring_model

            return LanguageModelScorer(
                load_scoring_model(
                    self.path,
                    self.scoring,
                    device=self.device,
                    gpus=self.gpus,
                    threads=self.threads,
                    bos_id=self.bos_id,
                )
            )
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

    def made_by(self, scorer: Scorer) -> dict[str, Any]:
        """What equal bytes are promised for: device, dtype, sequences a pass, and libraries."""
        if not isinstance(scorer, LanguageModelScorer):
            return libraries()
        from stillhouse.models.causal_lm import choose_device, choose_dtype
        from stillhouse.models.device import device_name

        device = choose_device(self.device, self.gpus)
        dtype = str(choose_dtype(self.scoring.dtype, device)).removeprefix("torch.")
        made = {"device": device_name(device), "dtype": dtype}
        return made | {"micro_batch": scorer.model.micro_batch} | libraries()


class ScorerHost:
    """Hosts one scorer; hosted by `stillhouse.actors.part_worker.PartWorker`."""

    def __init__(self, store: Store, settings: ScorerSettings) -> None:
        self._store = store
        self._settings = settings
        self._scorer = settings.build()
        self._ahead: dict[str, pa.Table] = {}

    def run(self, task: ScoreTask) -> Receipt:
        """Score one part."""
        tokens = self._ahead.pop(task.fingerprint, None)
        if tokens is None:
            tokens = read_tokens(self._store, task.part)
        made_by = partial(self._settings.made_by, self._scorer)
        return score_part(self._store, self._scorer, task, tokens, made_by)

    def prefetch(self, task: ScoreTask) -> None:
        """Read a part, perhaps while another is scored."""
        self._ahead[task.fingerprint] = read_tokens(self._store, task.part)
