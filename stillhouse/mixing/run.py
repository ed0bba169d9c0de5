"""One mixing run: a policy and a seed, from its newest checkpoint to its model in the store."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillhouse.mixing.arms import ArmPart, ArmReader
from stillhouse.mixing.collation import Collator
from stillhouse.mixing.evaluation import Evaluation, evaluate
from stillhouse.mixing.mixer import MixerHandle
from stillhouse.mixing.target import Shots, choose_shots, target_rows
from stillhouse.mixing.task import MixTask
from stillhouse.mixing.trainer import MixTrainer
from stillhouse.models.causal_lm import save_model
from stillhouse.models.text_to_text import build_text_model, load_text_model
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.storage.filesystem import list_names, read_bytes
from stillhouse.storage.folders import put_folder
from stillhouse.storage.parquet import read_table
from stillhouse.text.tokenizer import PAD_TOKEN, Tokenizer, load_tokenizer
from stillhouse.training.checkpoint import Checkpoints
from stillhouse.training.fit import load_together
from stillhouse.training.group import WorkerGroup
from stillhouse.training.job import TOKENIZER_FILES
from stillhouse.training.optimisation import make_adafactor, make_optimizer
from stillhouse.training.state import Snapshot, put_snapshot

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


def run_mix(
    store: Store,
    task: MixTask,
    mixer: MixerHandle,
    *,
    device: torch.device,
    group: WorkerGroup | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Train to the end, or from the newest checkpoint on, and commit the best model.

    All workers call this; the first one speaks to the mixer and writes. Called again after any
    kind of death, it decides the same draws (bitwise with the same number of workers).

    Raises:
        DivergedError: a loss, or too many rewards, were not finite.
        ArtifactError: the checkpoint is of another run.
    """
    group = group or WorkerGroup()
    run = _MixRun(store, task, mixer, device, group)
    try:
        run.train(on_step or (lambda step, num_steps: None))
        return run.finish()
    finally:
        run.close()


class _MixRun:
    def __init__(
        self,
        store: Store,
        task: MixTask,
        mixer: MixerHandle,
        device: torch.device,
        group: WorkerGroup,
    ) -> None:
        self._store, self._task, self._mixer = store, task, mixer
        self._device, self._group = device, group
        words = load_tokenizer(task.tokenizer, task.eos_token)
        self._shots = load_shots(store, task)
        self._model = start_model(task, words, device)
        self._collate = collator(task, words)
        adam = task.optimizer == "adamw"
        optimizer = (make_optimizer if adam else make_adafactor)(self._model, task.learning)
        parts = [ArmPart(p.name, store.path(p.uri), p.num_rows) for p in task.arms]
        self._arms = ArmReader(parts, seed=task.seed)
        self._trainer = MixTrainer(
            self._model,
            optimizer,
            self._arms,
            self._shots.train,
            self._collate,
            task.plan,
            task.learning,
            device=device,
            num_steps=task.num_steps,
            group=group,
            reference=_reference(task, device),
        )
        identity = {"task": task.fingerprint}
        self._checkpoints = Checkpoints(store, task.fingerprint, identity, keep_last=1)
        self._seen = _Progress()

    def close(self) -> None:
        self._trainer.close()
        self._arms.close()

    def train(self, on_step: Callable[[int, int], None]) -> None:
        """From the newest checkpoint, or the beginning, to the last step or the early stop."""
        task = self._task
        self._begin()
        with self._checkpoints:
            while self._trainer.step_number < task.num_steps and not self._stopped():
                self._step()
                number = self._trainer.step_number
                on_step(number, task.num_steps)
                if number % task.evaluate_every == 0 or number == task.num_steps:
                    self._measure()
                    self._save()
        self._group.gather(None)  # the first worker's checkpoints are there for the others

    def finish(self) -> Manifest:
        """Measure the best checkpoint on the test split; the first worker commits the model."""
        seen, task = self._seen, self._task
        if seen.best_step != self._trainer.step_number:
            best = self._checkpoints.load(seen.best_step).snapshot
            put_snapshot(best, self._model, torch.optim.SGD(self._model.parameters(), lr=0.0))
        test = self._evaluate(self._shots.test)
        if self._group.rank == 0:
            self._commit(test)
        self._group.gather(None)  # the others wait until it is there
        return self._store.get_manifest("models", task.fingerprint)

    def _begin(self) -> None:
        loaded = load_together(self._checkpoints, self._group)
        if loaded is not None:
            state = self._restore(loaded.snapshot)
            if self._group.rank == 0:
                self._mixer.resume(state)
            return
        rewards: list[float] = []
        if self._task.mixer.settings.needs_initial_pass:
            rewards = self._trainer.initial_rewards(self._task.initial_examples)
        if self._group.rank == 0:
            self._mixer.begin(rewards)

    def _restore(self, snapshot: Snapshot) -> dict[str, Any]:
        """All but the mixer, whose state is returned."""
        self._trainer.restore(snapshot)
        extra = snapshot.progress["extra"]
        self._seen = _Progress(**extra["seen"])
        return extra["mixer"]

    def _stopped(self) -> bool:
        patience = self._task.patience
        return patience is not None and self._seen.since_best >= patience

    def _step(self) -> None:
        first = self._group.rank == 0
        draw = self._group.gather(self._mixer.deal() if first else None)[0]
        record = self._trainer.step(draw.arms, draw.weights)
        if first:
            self._seen.complaints += self._mixer.learn(record.rewards)
        self._seen.losses.append((record.auxiliary_loss, record.target_loss))
        self._seen.seconds += record.seconds
        self._seen.data_wait_s += record.data_wait_s

    def _measure(self) -> None:
        """The validation half decides; test rows are only looked at, for the report's curve."""
        seen, number = self._seen, self._trainer.step_number
        validation = self._evaluate(self._shots.validation)
        heldout = self._evaluate(self._shots.test[:_CURVE_ROWS])
        seen.curve.append(
            {
                "step": number,
                "passes": self._trainer.passes,
                "validation_nll": validation.nll,
                "validation_accuracy": validation.accuracy,
                "heldout_nll": heldout.nll,
            }
        )
        seen.since_best += 1
        if validation.score <= seen.best_score:
            seen.best_step, seen.best_score, seen.since_best = number, validation.score, 0

    def _evaluate(self, rows: Any) -> Evaluation:
        return evaluate(self._model, self._collate, rows, device=self._device, group=self._group)

    def _save(self) -> None:
        first = self._group.rank == 0
        state = self._mixer.checkpoint() if first else {}
        snapshot = self._trainer.snapshot({"mixer": state, "seen": asdict(self._seen)})
        if first:
            self._checkpoints.save(snapshot, self._seen_score())

    def _seen_score(self) -> float:
        """Of this measurement, as the checkpoints compare it."""
        row = self._seen.curve[-1]
        accuracy = row["validation_accuracy"]
        return Evaluation(row["validation_nll"], accuracy, None, 0).score

    def _commit(self, test: Evaluation) -> None:
        task, seen = self._task, self._seen
        there = list_names(task.tokenizer)
        files = {n: read_bytes(f"{task.tokenizer}/{n}") for n in TOKENIZER_FILES if n in there}

        def save(folder: Path) -> None:
            save_model(self._model, folder)
            for name, content in files.items():
                (folder / name).write_bytes(content)

        put_folder(
            self._store,
            task.fingerprint,
            save,
            inputs=task.inputs,
            settings=task.settings,
            totals={
                "role": "mixed",
                "label": f"{task.label}, seed {task.seed}",
                "policy": task.label,
                "seed": task.seed,
                "num_steps": self._trainer.step_number,
                "best_step": seen.best_step,
                "gradient_passes": self._trainer.passes,
                "test": asdict(test),
                "curve": seen.curve,
                "losses": seen.losses,
                "complaints": seen.complaints,
                "seconds": seen.seconds,
                "data_wait_s": seen.data_wait_s,
                "workers": self._group.size,
                "log": task.mixer.log,
                **self._mixer.summary(),
            },
        )


def load_shots(store: Store, task: MixTask) -> Shots:
    """The target's rows, as the task's seed divides them."""
    rows, splits = target_rows(read_table(store.path(task.target)))
    return choose_shots(rows, splits, num_shots=task.num_shots, seed=task.seed)


def start_model(task: MixTask, words: Tokenizer, device: torch.device) -> PreTrainedModel:
    """The model that the run begins with, on its device."""
    if isinstance(task.init, str):
        model = load_text_model(task.init, encoder_decoder=task.encoder_decoder, device=device)
    else:
        model = build_text_model(
            task.init,
            encoder_decoder=task.encoder_decoder,
            vocab_size=words.vocab_size,
            num_positions=task.max_input + task.max_target + 1 + int(task.bos_id is not None),
            seed=task.seed,
            eos_id=words.eos_id,
            pad_id=pad_id(words),
        )
        model.to(device)  # pyright: ignore[reportArgumentType]
    if task.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _reference(task: MixTask, device: torch.device) -> PreTrainedModel | None:
    if task.reference is None:
        return None
    model = load_text_model(task.reference, encoder_decoder=task.encoder_decoder, device=device)
    return model.eval().requires_grad_(False)


def collator(task: MixTask, words: Tokenizer) -> Collator:
    """Batches for the task's model."""
    kind = "encoder_decoder" if task.encoder_decoder else "decoder"
    return Collator(kind, words.eos_id, pad_id(words), task.bos_id)


def pad_id(words: Tokenizer) -> int:
    """The id of padding, which masks keep out of everything: any id will do."""
    for token in (PAD_TOKEN, "<pad>"):
        found = words.backend.token_to_id(token)
        if found is not None:
            return found
    return words.eos_id
