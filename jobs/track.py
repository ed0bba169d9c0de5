"""Trackers of experiments: a job's curves and numbers, sent to TensorBoard, wandb or mlflow.

Points of trainings and their held-out losses are sent as they come; the curves of the report that
have no such events (rewards of a mixture, losses of a distillation) and the numbers of the result
at the end. A tracker that fails costs a warning and is not told any more: the job goes on. Each run
is one run of the tracker, also after it was stopped and started again.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, Protocol

import yaml

from stillhouse.pipelines.context import Listener, PassingOn
from stillhouse.spec import JobSpec
from stillhouse.storage.filesystem import absolute_uri, join

_LIVE = ("train point", "train evaluation")
_NOT_NUMBERS = {"status", "job", "run", "report", "artifacts", "work", "warnings", "published"}
_ID_LENGTH = 16


class Tracker(Protocol):
    """Where numbers go; `failed` at the end says how the run ended."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `FOLDER/<name>-<id>`."""

    def __init__(self, folder: str, name: str, run_id: str, spec: JobSpec) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        self._summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
        place = join(absolute_uri(folder), f"{name}-{run_id}")
        self._writer: Any = EventFileWriter(place, flush_secs=10)

    def log(self, values: Mapping[str, float], step: int) -> None:
        made = [self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        summary = self._summary(value=made)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of a project; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str, name: str, run_id: str, spec: JobSpec) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=20)
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            config=yaml.safe_load(spec.to_yaml()),
            settings=settings,
        )
        self._known: set[str] = set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Each tag has its own axis of steps: those of wandb may not go back."""
        for tag in values.keys() - self._known:
            self._run.define_metric(tag, step_metric=f"{tag}/step")
            self._known.add(tag)
        self._run.log({**values, **{f"{tag}/step": step for tag in values}})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of the experiment `stillhouse`, at a tracking URI: a server's address or a folder."""

    def __init__(self, uri: str, name: str, run_id: str, spec: JobSpec) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(uri if "://" in uri else f"file://{absolute_uri(uri)}")
        experiment = self._client.get_experiment_by_name("stillhouse")
        number = experiment.experiment_id if experiment else None
        number = number or self._client.create_experiment("stillhouse")
        tag = "stillhouse.run"
        there = self._client.search_runs([number], f"tags.`{tag}` = '{run_id}'", max_results=1)
        if there:
            self._id = there[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(number, run_name=name, tags={tag: run_id})
        self._id = made.info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(tag, v, now, step) for tag, v in values.items()])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_KINDS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


class Tracked(PassingOn):
    """Passes a job's events on to `shown`, and its numbers to the spec's trackers."""

    def __init__(self, shown: Listener, spec: JobSpec, job: str, run_id: str) -> None:
        super().__init__(shown)
        self._trackers: dict[str, Tracker] = {}
        places = spec.track.model_dump(exclude_none=True) if spec.track else {}
        name = (spec.name or job).replace("/", "-")
        for kind, place in places.items():
            with _Forgiving(self, kind):
                self._trackers[kind] = _KINDS[kind](place, name, run_id[:_ID_LENGTH], spec)

    def note(self, kind: str, content: dict[str, Any]) -> None:
        super().note(kind, content)
        if kind in _LIVE and self._trackers:
            values = {k: v for k, v in content.items() if k not in ("step", "num_steps")}
            prefix = f"{values.pop('training')}/{kind.split()[1]}"
            self._log(numbers_in(values, prefix), content["step"])

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The result of the run, or None if it ended with an error."""
        if not self._trackers:
            return
        if result is not None:
            if result["job"] in ("mix", "distill"):
                self._send_curves(result["run"])
            left = {key: value for key, value in result.items() if key not in _NOT_NUMBERS}
            self._log(numbers_in(left, "result"), 0)
        for kind, tracker in [*self._trackers.items()]:
            with _Forgiving(self, kind):
                tracker.close(failed=result is None)

    def _send_curves(self, run: str) -> None:
        from stillhouse.report.page import read

        page = read(run)
        at: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for section in page.sections:
            for block in page.find(section.name, "curves"):
                for name, seeds in block.curves.items():
                    for number, points in enumerate(seeds):
                        tag = f"{block.caption or block.y_title}/{name}"
                        tag += f"/{number}" if len(seeds) > 1 else ""
                        for x, y in points:
                            at[round(x)] |= numbers_in({tag: y}, "")
        for step, values in sorted(at.items()):
            self._log(values, step)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for kind, tracker in [*self._trackers.items()]:
            with _Forgiving(self, kind):
                tracker.log(values, step)

    def forget(self, kind: str, error: Exception) -> None:
        """Warn, and tell this tracker nothing any more."""
        self._trackers.pop(kind, None)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        text = f"track.{kind}: {said}: it is told nothing more, the job goes on"
        print(f"warning: {text}", file=sys.stderr, flush=True)
        self._shown.note("tracker", {"tracker": kind, "message": text})


class _Forgiving:
    """Turns any error inside into a warning, after which the tracker is forgotten."""

    def __init__(self, tracked: Tracked, kind: str) -> None:
        self._tracked, self._kind = tracked, kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._tracked.forget(self._kind, error)
        return True


def numbers_in(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The finite numbers in nested values, by their path: letters, digits and `_-./ ` only."""
    return dict(_numbers(values, prefix))


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = "".join(c if c.isalnum() or c in "_-./ " else "_" for c in str(key))
            yield from _numbers(inner, f"{path}/{name}" if path else name)
    elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        yield path, float(value)
