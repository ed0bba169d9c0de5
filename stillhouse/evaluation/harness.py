"""One model measured on one task by lm-evaluation-harness (Gao et al.), in a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stillhouse.errors import ArtifactError, InputError
from stillhouse.evaluation.harness_tasks import asked_task, named_error, quiet
from stillhouse.evaluation.tasks import TaskSource
from stillhouse.mixing.preparation import Example
from stillhouse.storage.artifact import Store, libraries
from stillhouse.storage.task import Output, Place, Task

_BOOTSTRAPS = 100
"""Resamples for standard errors that have no formula."""


@dataclass(frozen=True)
class HarnessTask(Task):
    """A model, or one of its checkpoints, measured on one task.

    Its receipt's info has `results` (by task, since a name may be that of a group: metrics and
    their standard errors); of rows also `chance`, what a guess is worth where there are choices,
    `cut`, how many do not fit the model's context whole, and `unusable`, how many by reason.

    Attributes:
        model: fingerprint of the trained model.
        step: of the checkpoint; None for the model itself.
        harness: version of the package, which defines its own tasks.
        folder: of the model.
    """

    KIND = "evaluations"

    model: str
    step: int | None
    source: TaskSource
    num_fewshot: int | None
    limit: int | None
    batch_size: int
    bos_id: int | None
    harness: str | None
    folder: Place[str]

    def run(self, store: Store, host: "ModelHost", loaded: Any) -> Output:
        model = host.model(store, self)
        with TemporaryDirectory() as folder, quiet():
            import lm_eval

            harness: Any = lm_eval
            made = asked_task(self.source, Path(folder))
            measured = made.measured[: self.limit]
            cut = _num_cut(self.source.name, model, measured)
            try:
                found = harness.simple_evaluate(
                    model=model,
                    tasks=[made.task],
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=False,
                    task_manager=made.manager,
                )
            except Exception as error:
                raise named_error(self.source.name, error) from error
        results = {name: _metrics(values) for name, values in found["results"].items()}
        counted = found.get("n-samples", {})
        rows = sum(int(one["effective"]) for one in counted.values())
        info = {"results": results, "chance": _chance(measured), "cut": cut}
        return Output((), {"rows": rows}, info | {"unusable": made.unusable, **libraries()})


def _chance(rows: Sequence[Example]) -> float | None:
    """What an answer drawn at random is worth; None without choices."""
    if not rows or not rows[0].choices:
        return None
    return sum(1 / len(one.choices) for one in rows) / len(rows)


def _num_cut(name: str, model: Any, rows: Sequence[Example]) -> int:
    """How many rows are longer than a causal model's context: their beginnings are cut off.

    Raises:
        InputError: a choice or target that is longer by itself.
    """
    cut = 0
    for row in () if model.backend == "seq2seq" else rows:
        if not row.input:
            continue  # a text is measured in pieces
        asked = len(model.tok_encode(row.input))
        longest = max(len(model.tok_encode(f" {one}")) for one in row.choices or (row.target,))
        if longest > model.max_length:
            raise InputError(
                f"`evaluate.tasks`: {name}: a choice or target of {longest:,} tokens; the model "
                f"reads {model.max_length:,}"
            )
        cut += asked + longest > model.max_length + 1
    return cut


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Numbers alone; `acc,none` as `acc`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in sorted(values.items())
        if isinstance(value, int | float) and key not in ("alias", "sample_len", "sample_count")
    }


@dataclass(frozen=True, slots=True)
class HarnessHost:
    """Settings of the worker's host."""

    device: str
    gpus: float
    threads: int

    def build(self, store: Store) -> "ModelHost":
        import torch

        from stillhouse.models.device import choose_device

        torch.set_num_threads(self.threads)
        return ModelHost(choose_device(self.device, self.gpus))


@dataclass(slots=True)
class ModelHost:
    """Keeps the last model, as the harness wants it."""

    device: Any
    _key: tuple[str, int | None, int] | None = None
    _model: Any = field(default=None, repr=False)

    def model(self, store: Store, task: HarnessTask) -> Any:
        key = (task.folder, task.step, task.batch_size)
        if key != self._key:
            self._key = self._model = None
            self._model = _harness_model(store, task, self.device)
            self._key = key
        return self._model


def _harness_model(store: Store, task: HarnessTask, device: Any) -> Any:
    """The model as the harness wants it; its tokenizer is the one in its folder."""
    from transformers import AutoConfig, AutoTokenizer

    from stillhouse.models.text_to_text import load_text_model
    from stillhouse.storage.folders import local_folder

    with local_folder(task.folder, (".json",)) as folder:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = bool(config.is_encoder_decoder)
    model: Any = load_text_model(task.folder, encoder_decoder=pair, device=device, dtype="auto")
    if task.step is not None:
        _put_checkpoint(store, task, model)
    model.eval()
    with quiet():
        from lm_eval.models import huggingface

        made: Any = huggingface.HFLM
        return made(
            pretrained=model,
            backend="seq2seq" if pair else "causal",
            tokenizer=tokenizer,
            batch_size=task.batch_size,
            device=str(device),
            add_bos_token=task.bos_id is not None or None,
        )


def _put_checkpoint(store: Store, task: HarnessTask, model: Any) -> None:
    """Give the model the weights of one of its training's checkpoints."""
    import torch

    from stillhouse.training.checkpoint import WEIGHT, Checkpoints
    from stillhouse.training.task import checkpoints_of

    tensors = Checkpoints(store, checkpoints_of(task.model)).load(task.step or 0).tensors
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if WEIGHT + name not in tensors:
                raise ArtifactError(f"the checkpoint at step {task.step} has no `{name}`")
            parameter.copy_(tensors[WEIGHT + name])
