"""One model measured on one task by lm-evaluation-harness (Gao et al.), in a worker."""

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from stillhouse.errors import InputError, ModelError
from stillhouse.evaluation.tasks import TaskSource, read_task_file
from stillhouse.fingerprint import canonical_json
from stillhouse.mixing.preparation import BadRow, Example, read_examples
from stillhouse.storage.artifact import Store, libraries
from stillhouse.storage.filesystem import read_bytes
from stillhouse.storage.task import Output, Place, Task

EXAMPLES, MEASURED = "train", "test"
_BOOTSTRAPS = 100
"""Resamples for standard errors that have no formula."""


@dataclass(frozen=True)
class HarnessTask(Task):
    """A model, or one of its checkpoints, measured on one task.

    Its receipt's info has `results` (by task, since a name may be that of a group: metrics and
    their standard errors) and `chance`, what a guess is worth, for rows with choices.

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
    harness: str
    folder: Place[str]

    def run(self, store: Store, host: "ModelHost", loaded: Any) -> Output:
        import lm_eval

        harness: Any = lm_eval
        model = host.model(store, self)
        with TemporaryDirectory() as folder, _quiet():
            task, manager, chance = _asked(self.source, Path(folder))
            shots = self.num_fewshot
            if shots is None and self.source.kind == "rows":
                shots = 0
            try:
                found = harness.simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=shots,
                    limit=self.limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=False,
                    task_manager=manager,
                )
            except NotImplementedError as error:
                raise ModelError(f"`evaluate.tasks`: {self.source.name}: {error}") from error
        results = {name: _metrics(values) for name, values in found["results"].items()}
        counted = found.get("n-samples", {})
        rows = sum(int(one["effective"]) for one in counted.values())
        info = {"results": results, "chance": chance, **libraries()}
        return Output((), {"rows": rows}, info)


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
    from lm_eval.models import huggingface
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    from stillhouse.models.causal_lm import choose_dtype, load_model, load_weights
    from stillhouse.storage.folders import local_folder

    with local_folder(task.folder, (".json",)) as folder:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    if config.is_encoder_decoder:
        dtype = choose_dtype("auto", device)
        model: Any = load_weights(AutoModelForSeq2SeqLM, task.folder, dtype).to(device)
    else:
        model = load_model(task.folder, dtype="auto", device=device)
    if task.step is not None:
        _put_checkpoint(store, task, model)
    model.eval()
    made: Any = huggingface.HFLM
    with _quiet():
        return made(
            pretrained=model,
            backend=kind,
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
            if WEIGHT + name in tensors:
                parameter.copy_(tensors[WEIGHT + name])


def check_task(source: TaskSource) -> str | None:
    """What is wrong with a task, before anything is trained; None if nothing is.

    Run on a worker. Rows are read up to the first that can be used.
    """
    if source.kind == "rows":
        example = next((one for one in _examples(source, {}) if one), None)
        return None if example else f"{source.name}: no row can be used"
    if source.kind == "yaml":
        return None  # the harness itself tells best what is wrong, when it loads it
    with _quiet():
        known = _all_tasks().all_tasks
    if source.name in known:
        return None
    close = get_close_matches(source.name, known, 3)
    hint = f"; did you mean {', '.join(close)}?" if close else ": `lm-eval ls tasks` lists them"
    return f"{source.name!r} is neither a task of lm-evaluation-harness nor a file{hint}"


# ------------------------------------------------------------------------------- configurations


def _asked(source: TaskSource, folder: Path) -> tuple[Any, Any, float | None]:
    """What the harness takes for a task, the manager of tasks that knows it, and what a guess is
    worth. Files are put into `folder`.
    """
    from lm_eval.tasks import TaskManager

    if source.kind == "name":
        return source.name, _all_tasks(), None
    if source.kind == "yaml":
        place = _put_task_file(source, folder)
        return source.name, TaskManager(include_path=place, include_defaults=False), None
    config, chance = _rows_config(source, folder)
    return config, TaskManager(include_defaults=False), chance


@cache
def _all_tasks() -> Any:
    """The manager of the harness's own tasks, which reads their thousands of files once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _put_task_file(source: TaskSource, folder: Path) -> str:
    """A task file that includes the given one, with copies of its files; the folder it is in."""
    copies: dict[str, str] = {}
    for number, (name, uri) in enumerate(zip(source.files, source.uris, strict=True)):
        relative = "://" not in name and not name.startswith("/") and ".." not in name
        copy = folder / "files" / (name if relative else f"{number}-{Path(name).name}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(read_bytes(uri))
        copies[name] = str(copy)
    content: dict[str, Any] = {"include": copies[source.files[0]], "task": source.name}
    options = dict(read_task_file(copies[source.files[0]]).get("dataset_kwargs") or {})
    if "data_files" in options:
        options["data_files"] = _renamed(options["data_files"], copies)
        content["dataset_kwargs"] = options | {"cache_dir": str(folder / "cache")}
    made = folder / "task" / "task.yaml"
    made.parent.mkdir()
    made.write_text(yaml.safe_dump(content))
    return str(made.parent)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names[value]


def _rows_config(source: TaskSource, folder: Path) -> tuple[dict[str, Any], float | None]:
    """Rows as a task of the harness: choices are ranked, targets without choices and texts rated.

    Raises:
        InputError: no row can be used; choices in some rows only.
    """
    counts: dict[str, int] = {}
    examples = [one for one in _examples(source, counts) if one]
    measured = [one for one in examples if one.split == MEASURED] or examples
    others = [one for one in examples if one.split not in ("", MEASURED)]
    if not measured:
        raise InputError(f"`evaluate.tasks`: {source.name}: no row can be used: {counts}")
    forms = {("choices" if one.choices else "target" if one.input else "text") for one in examples}
    if len(forms) > 1:
        raise InputError(
            f"`evaluate.tasks`: {source.name}: rows of several forms ({', '.join(sorted(forms))}):"
            " make each a task of its own, by `where`"
        )
    [form] = forms
    files = {MEASURED: measured} | ({EXAMPLES: others} if others else {})
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_bytes(b"\n".join(map(_row, rows)))
    config = {
        "task": source.name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in files},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": MEASURED,
        "fewshot_split": EXAMPLES if others else MEASURED,
        "doc_to_text": "input",
        "doc_to_target": "target",
        **_FORMS[form],
    }
    if form != "choices":
        return config, None
    return config, sum(1 / len(one.choices) for one in measured) / len(measured)


def _metric(name: str, *, higher: bool, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


_FORMS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [_metric("acc", higher=True), _metric("acc_norm", higher=True)],
    },
    "target": {
        "output_type": "loglikelihood",
        "target_delimiter": "",  # the harness puts none there: `_row` does
        "metric_list": [
            _metric("acc", higher=True),
            _metric("perplexity", higher=False, aggregation="perplexity"),
        ],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "metric_list": [
            _metric(name, higher=False, aggregation=kind)
            for name, kind in (
                ("bits_per_byte", "bits_per_byte"),
                ("byte_perplexity", "weighted_perplexity"),
            )
        ],
    },
}


def _row(example: Example) -> bytes:
    row: dict[str, Any] = {"input": example.input, "target": example.target}
    if example.choices:
        answer = example.choices.index(example.target)
        row |= {"choices": list(example.choices), "answer": answer}
    elif example.input:
        row["target"] = f" {example.target}"
    return canonical_json(row)


def _examples(source: TaskSource, counts: dict[str, int]) -> Iterator[Example | None]:
    """The usable rows, None for others, whose reasons are counted."""
    for uri in source.uris:
        read = partial(read_examples, where=source.where or {}, reader=source.reader)
        for one in read(uri):
            if isinstance(one, BadRow):
                counts[one.reason] = counts.get(one.reason, 0) + 1
                yield None
            else:
                yield one


@contextmanager
def _quiet() -> Generator[None]:
    """Warnings and progress bars of the harness off; it makes no processes of its own."""
    names = ("lm_eval", "lm-eval", "datasets")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    kept = {key: os.environ.get(key) for key in ("DISABLE_MULTIPROC", "TQDM_DISABLE")}
    os.environ.update(DISABLE_MULTIPROC="1", TQDM_DISABLE="1")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for key, value in kept.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
