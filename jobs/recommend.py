"""`stillhouse recommend`: settings for a new task, from finished sweeps over the same grid."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from stillhouse.errors import ArtifactError, SpecError, require
from stillhouse.jobs.ids import resolve
from stillhouse.recommend import Recommender, TaskGrid, leave_one_out
from stillhouse.storage.filesystem import absolute_uri
from stillhouse.storage.run_record import read_json, read_status

NEW = "new"
"""In a file of features: the task that a setting is recommended for."""


def recommend(
    runs: Sequence[str], store: str | None = None, features: str | None = None
) -> dict[str, Any]:
    """What the other tasks recommend for each one, and what all recommend for a new one.

    Args:
        runs: of sweeps, one for each task: URIs or ids of their own records.
        store: where ids are looked up.
        features: a YAML file: by run, as in `runs`, numbers that describe its task, and those of
            the `new` one.

    Returns:
        The object that `recommend --json` prints. `recommended` is None where features are given,
        but not those of the new task.

    Raises:
        ArtifactError: no finished sweep. SpecError: sweeps that cannot be compared, one that is
            given twice, or incomplete features.
    """
    require("sklearn")
    uris = [absolute_uri(resolve(run, store, ["runs"])) for run in runs]
    for i, uri in enumerate(uris):
        if uri in uris[:i]:
            first = runs[uris.index(uri)]
            raise SpecError(f"{runs[i]} is the same sweep as {first}: give every sweep once")
    described = _features(features, runs)
    found = [(run, _sweep_of(uri)) for run, uri in zip(runs, uris, strict=True)]
    tasks = [_task(run, sweep, described.get(run, {})) for run, sweep in found]
    first = found[0][1]
    for run, sweep in found:
        for key in ("metric", "mode"):
            if sweep[key] != first[key]:
                raise SpecError(
                    f"{run} has `{key}: {sweep[key]}`, {found[0][0]} has `{key}: {first[key]}`: "
                    "give sweeps of the same metric"
                )
    smallest = first["mode"] == "min"
    left_out = leave_one_out(tasks, smallest=smallest)
    recommended = None
    if features is None or NEW in described:
        settings = [*{repr(one): one for task in tasks for one in task.settings}.values()]
        best = Recommender(tasks, smallest=smallest).best(settings, described.get(NEW, {}))
        recommended = dict(settings[best])
    return {
        "metric": first["metric"],
        "mode": first["mode"],
        "tasks": [asdict(one) for one in left_out],
        "mean_regret": fmean(one.regret for one in left_out),
        "mean_gain": fmean(one.gain for one in left_out),
        "recommended": recommended,
    }


def _sweep_of(run: str) -> dict[str, Any]:
    """`sweep` of a sweep's result, with the name of its run."""
    result = read_json(run, "result.json")
    if result is None or "sweep" not in result:
        raise ArtifactError(
            f"{run} is no finished sweep: give `sweep.run` of its `run --json`, the record of the "
            "sweep itself"
        )
    status = read_status(run) or {}
    return result["sweep"] | {"name": status.get("name") or run.rsplit("/", 1)[-1][:12]}


def _task(run: str, sweep: Mapping[str, Any], features: Mapping[str, float]) -> TaskGrid:
    ran = [one for one in sweep["variants"] if one["metric"] is not None]
    if not ran:
        raise ArtifactError(f"{run}: no variant of the sweep has a result")
    settings, metrics = [one["values"] for one in ran], [one["metric"] for one in ran]
    return TaskGrid(sweep["name"], settings, metrics, features)


def _features(path: str | None, runs: Sequence[str]) -> dict[str, dict[str, float]]:
    """The features in a file, by run.

    Raises:
        SpecError: no such file, not of that form, runs that it does not name, or features that some
            of them lack.
    """
    if path is None:
        return {}
    try:
        content: Any = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"--features {path}: {error}") from None
    rows: dict[Any, Any] = content if isinstance(content, dict) else {path: content}
    for run, row in rows.items():
        if not isinstance(row, dict) or not all(map(_is_number, row.values())):
            raise SpecError(f"--features {path}: {run}: write it as `RUN: {{num_examples: 400}}`")
    missing = [run for run in runs if run not in rows]
    if missing:
        raise SpecError(f"--features {path} has nothing about {', '.join(missing)}")
    tasks = [*runs, *([NEW] if NEW in rows else [])]
    known = dict.fromkeys(name for task in tasks for name in rows[task])
    absent = {task: [name for name in known if name not in rows[task]] for task in tasks}
    lacking = [f"{task} lacks {', '.join(names)}" for task, names in absent.items() if names]
    if lacking:
        raise SpecError(f"--features {path}: {'; '.join(lacking)}")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
