"""One mixing run: a policy and a seed, from its newest checkpoint to its model in the store."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.spec import MixTask
from stillhouse.mixing.trainer import MixRecord, MixTrainer
from stillhouse.models.causal_lm import commit_model
from stillhouse.storage.artifact import Manifest, Store
from stillhouse.training.checkpoint import Checkpoints, fit, put_snapshot
from stillhouse.training.group import WorkerGroup

_CURVE_ROWS = 256


@dataclass(slots=True)
class _Measured:
    """What a run has measured, kept in its checkpoints.

    Attributes:
        curve: rows of step, passes, validation NLL and accuracy, held-out NLL.
        losses: auxiliary and target loss of each step.
        since_best: measurements since the best one.
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
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def add(self, record: MixRecord) -> None:
        self.complaints += record.complaints
        self.losses.append((record.auxiliary_loss, record.target_loss))
        self.seconds += record.seconds
        self.data_wait_s += record.data_wait_s

    def evaluate(self, trainer: MixTrainer) -> float:
        """The score on the validation half, which decides; test rows are only for the report's
        curve.
        """
        validation = trainer.evaluate(trainer.shots.validation)
        heldout = trainer.evaluate(trainer.shots.test[:_CURVE_ROWS])
        self.curve.append(
            {
                "step": trainer.step_number,
                "passes": trainer.passes,
                "validation_nll": validation.nll,
                "validation_accuracy": validation.accuracy,
                "heldout_nll": heldout.nll,
            }
        )
        self.since_best += 1
        if validation.score <= self.best_score:
            self.best_step, self.best_score = trainer.step_number, validation.score
            self.since_best = 0
        return validation.score


def run_mix(
    store: Store,
    task: MixTask,
    mixer: Mixer,
    *,
    device: torch.device,
    group: WorkerGroup | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Manifest:
    """Train to the end, resuming from the newest checkpoint, and commit the best model.

    All workers call this; the first one calls the mixer (or its stand-in for one in another
    process) and writes. Called again after any failure, it makes the same draws, bit for bit with
    the same number of workers.

    Raises:
        DivergedError: a loss, or too many rewards, were not finite.
    """
    group, measured = group or WorkerGroup(), _Measured()
    trainer = MixTrainer(store, task, mixer, device=device, group=group)
    num_steps, every, patience = task.rule.num_steps, task.train.evaluate_every, task.train.patience
    checkpoints = Checkpoints(store, task.fingerprint, keep_last=1)

    def after(record: MixRecord) -> float | None:
        measured.add(record)
        if on_step is not None:
            on_step(record.step)
        last = record.step == num_steps
        return measured.evaluate(trainer) if last or record.step % every == 0 else None

    try:
        fit(
            trainer,
            checkpoints,
            group,
            num_steps=num_steps,
            checkpoint_every=every,
            on_step=after,
            on_start=lambda step: None if step else trainer.begin(),
            beside={"seen": measured},
            stopped=lambda: patience is not None and measured.since_best >= patience,
        )
        group.gather(None)  # wait until the first worker's checkpoints are written
        if measured.best_step != trainer.step_number:
            best, model = checkpoints.load(measured.best_step), trainer.model
            frozen = torch.optim.SGD(model.parameters(), lr=0.0)
            put_snapshot(best, dict(model.named_parameters()), frozen)
        test = asdict(trainer.evaluate(trainer.shots.test))
        if group.rank == 0:
            totals = asdict(measured) | {"test": test, "workers": group.size} | mixer.summary()
            _commit(store, task, trainer, totals)
        group.gather(None)  # wait until the model is committed
    finally:
        trainer.arms.close()
    return store.get_manifest("models", task.fingerprint)


def _commit(store: Store, task: MixTask, trainer: MixTrainer, totals: dict[str, Any]) -> None:
    label = task.rule.label
    commit_model(
        store,
        task.fingerprint,
        trainer.model,
        task.tokenizer,
        inputs={"arms": [part.path for part in task.arms], "target": task.target},
        settings={
            "policy": task.decided_by,
            "seed": task.seed,
            "train": task.train.model_dump(mode="json"),
            "model": task.model.model_dump(mode="json"),
        },
        totals={
            "role": "mixed",
            "label": f"{label}, seed {task.seed}",
            "policy": label,
            "seed": task.seed,
            "num_steps": trainer.step_number,
            "gradient_passes": trainer.passes,
            "log": task.log,
            **totals,
        },
    )
