"""What a mixing run is, as plain values: all that its workers need to be told (without torch)."""

from dataclasses import dataclass, field
from typing import Any

from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.mixer import MixerTask
from stillhouse.mixing.plan import StepPlan
from stillhouse.spec import ModelSettings, Optimisation

MIX_VERSION = 5


@dataclass(frozen=True, slots=True)
class MixTask:
    """One run. Small plain values: a worker needs nothing else.

    Attributes:
        fingerprint: names the model artifact and the checkpoints.
        label: the policy, as people call it.
        init: folder of the model to start from, or the settings of a fresh one.
        target: part of the target's rows.
        tokenizer: folder in the store.
        max_input, max_target: longest in tokens, EOS not counted.
        evaluate_every: steps between measurements, which are also the checkpoints.
        patience: measurements without a better one that end the run; None for never.
        mixer: of this run.
        reference: folder of DoReMi's reference model.
    """

    fingerprint: str
    label: str
    seed: int
    init: str | ModelSettings
    encoder_decoder: bool
    arms: tuple[ArmPart, ...]
    target: str
    num_shots: int
    tokenizer: str
    eos_token: str
    max_input: int
    max_target: int
    plan: StepPlan
    num_steps: int
    learning: Optimisation
    optimizer: str
    activation_checkpointing: bool
    initial_examples: int
    evaluate_every: int
    patience: int | None
    mixer: MixerTask
    reference: str | None = None
    bos_id: int | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
