"""What a mixing run is, as plain values: all that its workers need to be told (without torch)."""

from dataclasses import dataclass
from typing import Any

from stillhouse.fingerprint import fingerprint
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.spec import MixModel, MixTraining, Rule

MIX_VERSION = 6


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that the spec names by path: a digest of its content, and its folder in the store."""

    digest: str
    folder: str


@dataclass(frozen=True)
class MixTask:
    """One run: a rule and a seed.

    Attributes:
        decided_by: identity of the rule's policy, as `Policy.identity`.
        model: what a fresh one looks like; of a given one only its kind is read.
        init: the model to start from; None for a fresh one.
        reference: DoReMi's reference model.
        target: path of the part of its rows.
        tokenizer: its folder in the store.
        max_input, max_target: longest in tokens, EOS not counted.
        log: URI of the folder of its decisions; no part of its identity.
        log_every: steps between two that log the whole distribution; neither.
    """

    rule: Rule
    seed: int
    decided_by: dict[str, Any]
    model: MixModel
    init: StoredModel | None
    reference: StoredModel | None
    arms: tuple[ArmPart, ...]
    target: str
    num_shots: int
    tokenizer: str
    tokenizer_digest: str
    eos_token: str
    bos_id: int | None
    max_input: int
    max_target: int
    train: MixTraining
    log: str
    log_every: int

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model is one, else a decoder."""
        return self.model.kind == "encoder_decoder"

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the model, by section; what the artifact is named by."""
        settings = dict(self.decided_by)
        if self.reference is not None:
            settings["reference"] = self.reference.digest
        found: dict[str, Any] = {
            "policy": settings,
            "seed": self.seed,
            "plan": [self.rule.slots, self.rule.num_steps, self.rule.plan.target_batches],
            "train": self.train.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json", exclude={"path", "from_"})
            if self.init is None
            else self.init.digest,
            "data": {
                "arms": [[part.name, part.sha256] for part in self.arms],
                "target": self.target,
                "num_shots": self.num_shots,
            },
            "tokenizer": self.tokenizer_digest,
        }
        if self.bos_id is not None:
            found["bos_id"] = self.bos_id
        return found

    @property
    def fingerprint(self) -> str:
        """Names the model artifact and the checkpoints."""
        return fingerprint(["mix", MIX_VERSION, self.identity])

    @property
    def regime(self) -> dict[str, Any]:
        """What a replay has to know beside the draws."""
        return {
            "policy": self.rule.label,
            "seed": self.seed,
            "slots": self.rule.slots,
            "micro_batch": self.train.micro_batch,
            "target_batches": self.rule.plan.target_batches,
            "weighted": self.rule.policy.weights_losses,
        }
