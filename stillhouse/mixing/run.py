"""One mixing run: a policy and a seed, from its newest checkpoint to its model in the store."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from stillhouse.mixing.arms import ArmReader
from stillhouse.mixing.batches import Collator
from stillhouse.mixing.evaluation import Evaluation, Shots, choose_shots, evaluate, target_rows
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.task import MixTask
from stillhouse.mixing.trainer import MixRecord, MixTrainer
from stillhouse.models.causal_lm import commit_model
from stillhouse.models.text_to_text import build_text_model, load_text_model
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import PAD_TOKEN, Tokenizer, load_tokenizer
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fit import fit
from stillhouse.training.group import WorkerGroup
from stillhouse.training.optimisation import make_adafactor, make_optimizer
from stillhouse.training.state import put_snapshot

_CURVE_ROWS = 256


@dataclass(slots=True)
class _Progress:
    """What a run has seen, in its checkpoints: plain JSON values.

    `curve`: rows of step, passes, validation NLL and accuracy, held-out NLL. `losses`: auxiliary
    and target loss of each step.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[tuple[float | None, float | None]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    best_step: int = 0
    best_score: float = float("inf")
    since_best: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            setattr(self, name, value)


def run_mix(
    store: Store,
    task: MixTask,
    mixer: Mixer,
    *,
    device: torch.device,
    group: WorkerGroup | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Manifest:
    """Train to the end, or from the newest checkpoint on, and commit the best model.

    All workers call this; the first one speaks to the mixer (or a stand-in for it in another
    process) and writes. Called again after any kind of death, it decides the same draws (bitwise
    with the same number of workers).

    Raises:
        DivergedError: a loss, or too many rewards, were not finite.
        ArtifactError: the checkpoint is of another run.
    """
    run = _MixRun(store, task, mixer, device, group or WorkerGroup(), on_step)
    try:
        return run.train()
    finally:
        run.trainer.close()
        run.arms.close()


class _MixRun:
    def __init__(
        self,
        store: Store,
        task: MixTask,
        mixer: Mixer,
        device: torch.device,
        group: WorkerGroup,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._store, self._task, self._mixer = store, task, mixer
        self._device, self._group, self._on_step = device, group, on_step
        self._shots = load_shots(store, task)
        self.arms = ArmReader(store, task.arms, seed=task.seed)
        model = start_model(task, device)
        self.trainer = make_trainer(task, model, self.arms, self._shots, mixer, device, group)
        self._seen = _Progress()

    def train(self) -> Manifest:
        """From the newest checkpoint, or the beginning, to the last step or the early stop; then
        the best checkpoint is measured on the test split, and the first worker commits it.
        """
        task, seen, group, trainer = self._task, self._seen, self._group, self.trainer
        patience, identity = task.train.patience, {"task": task.fingerprint}
        checkpoints = Checkpoints(self._store, task.fingerprint, identity, keep_last=1)
        fit(
            trainer,
            checkpoints,
            group,
            num_steps=task.rule.num_steps,
            checkpoint_every=task.train.evaluate_every,
            on_step=self._after,
            on_start=self._begin,
            beside={"seen": seen},
            stopped=lambda: patience is not None and seen.since_best >= patience,
        )
        group.gather(None)  # the first worker's checkpoints are there for the others
        if seen.best_step != trainer.step_number:
            best, model = checkpoints.load(seen.best_step).snapshot, trainer.model
            put_snapshot(best, model, torch.optim.SGD(model.parameters(), lr=0.0))
        test = self._evaluate(self._shots.test)
        if group.rank == 0:
            self._commit(test)
        group.gather(None)  # the others wait until it is there
        return self._store.get_manifest("models", task.fingerprint)

    def _begin(self, step: int) -> None:
        if step == 0:
            examples = self._task.rule.policy.first_examples
            rewards = self.trainer.initial_rewards(examples) if examples else []
            if self._group.rank == 0:
                self._mixer.begin(rewards)

    def _after(self, record: MixRecord) -> float | None:
        """The score, after the steps at which it is measured."""
        seen, step = self._seen, record.step
        seen.complaints += record.complaints
        seen.losses.append((record.auxiliary_loss, record.target_loss))
        seen.seconds += record.seconds
        seen.data_wait_s += record.data_wait_s
        if self._on_step is not None:
            self._on_step(step)
        last = step == self._task.rule.num_steps
        return self._measure() if last or step % self._task.train.evaluate_every == 0 else None

    def _measure(self) -> float:
        """The score on the validation half, which decides; test rows are only looked at, for the
        report's curve.
        """
        seen, number = self._seen, self.trainer.step_number
        validation = self._evaluate(self._shots.validation)
        heldout = self._evaluate(self._shots.test[:_CURVE_ROWS])
        seen.curve.append(
            {
                "step": number,
                "passes": self.trainer.passes,
                "validation_nll": validation.nll,
                "validation_accuracy": validation.accuracy,
                "heldout_nll": heldout.nll,
            }
        )
        seen.since_best += 1
        if validation.score <= seen.best_score:
            seen.best_step, seen.best_score, seen.since_best = number, validation.score, 0
        return validation.score

    def _evaluate(self, rows: Any) -> Evaluation:
        trainer = self.trainer
        return evaluate(
            trainer.model, trainer.collate, rows, device=self._device, group=self._group
        )

    def _commit(self, test: Evaluation) -> None:
        task, seen, rule = self._task, self._seen, self._task.rule
        commit_model(
            self._store,
            task.fingerprint,
            self.trainer.model,
            task.tokenizer,
            inputs={"arms": [part.path for part in task.arms], "target": task.target},
            settings=task.identity,
            totals={
                "role": "mixed",
                "label": f"{rule.label}, seed {task.seed}",
                "policy": rule.label,
                "seed": task.seed,
                "num_steps": self.trainer.step_number,
                "best_step": seen.best_step,
                "gradient_passes": self.trainer.passes,
                "test": asdict(test),
                "curve": seen.curve,
                "losses": seen.losses,
                "complaints": seen.complaints,
                "seconds": seen.seconds,
                "data_wait_s": seen.data_wait_s,
                "workers": self._group.size,
                "log": task.log,
                **self._mixer.summary(),
            },
        )


def load_shots(store: Store, task: MixTask) -> Shots:
    """The target's rows, as the task's seed divides them."""
    rows, splits = target_rows(read_table(store.path(task.target)))
    return choose_shots(rows, splits, num_shots=task.num_shots, seed=task.seed)


def start_model(task: MixTask, device: torch.device) -> PreTrainedModel:
    """The model that the run begins with, on its device."""
    tokenizer, encoder_decoder = _tokenizer(task), task.encoder_decoder
    if task.init is not None:
        model = load_text_model(task.init.folder, encoder_decoder=encoder_decoder, device=device)
    else:
        model = build_text_model(
            task.model,
            encoder_decoder=encoder_decoder,
            vocab_size=tokenizer.vocab_size,
            num_positions=task.max_input + task.max_target + 1 + int(task.bos_id is not None),
            seed=task.seed,
            eos_id=tokenizer.eos_id,
            pad_id=_pad_id(tokenizer),
        )
        model.to(device)  # pyright: ignore[reportArgumentType]
    if task.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_trainer(
    task: MixTask,
    model: PreTrainedModel,
    arms: ArmReader,
    shots: Shots,
    mixer: Mixer,
    device: torch.device,
    group: WorkerGroup,
) -> MixTrainer:
    """The trainer of a task, with its optimiser and DoReMi's reference model."""
    tokenizer, make = _tokenizer(task), make_adafactor
    if task.train.optimizer == "adamw":
        make = make_optimizer
    reference = None
    if task.reference is not None:
        there = task.reference.folder
        reference = load_text_model(there, encoder_decoder=task.encoder_decoder, device=device)
        reference.eval().requires_grad_(False)
    return MixTrainer(
        task,
        model,
        make(model, task.train.optimisation(task.seed)),
        arms,
        shots.train,
        Collator(task.encoder_decoder, tokenizer.eos_id, _pad_id(tokenizer), task.bos_id),
        mixer,
        device=device,
        group=group,
        reference=reference,
    )


def _tokenizer(task: MixTask) -> Tokenizer:
    return load_tokenizer(task.tokenizer, task.eos_token)


def _pad_id(tokenizer: Tokenizer) -> int:
    """The id of padding, which masks keep out of everything: any id will do."""
    for token in (PAD_TOKEN, "<pad>"):
        found = tokenizer.backend.token_to_id(token)
        if found is not None:
            return found
    return tokenizer.eos_id
