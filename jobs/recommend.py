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
        ArtifactError: no finished sweep. SpecError: sweeps that cannot be compared.
    """
    require("sklearn")
    described = _features(features, runs)
    found = [(run, _sweep_of(absolute_uri(resolve(run, store, ["runs"])))) for run in runs]
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
        SpecError: no such file, not of that form, or a run that it does not name.
    """
    if path is None:
        return {}
    try:
        content: Any = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise SpecError(f"--features {path}: {error}") from None
    rows = [*content.values()] if isinstance(content, dict) else [None]
    if not all(isinstance(row, dict) and _all_numbers(row) for row in rows):
        raise SpecError(f"--features {path}: write it as `RUN: {{num_examples: 400}}`")
    missing = [run for run in runs if run not in content]
    if missing:
        raise SpecError(f"--features {path} has nothing about {missing[0]}")
    wanted, new = {*content[runs[0]]}, {*content.get(NEW, content[runs[0]])}
    if new != wanted:
        raise SpecError(
            f"--features {path}: `{NEW}` has {sorted(new)}, the others have {sorted(wanted)}"
        )
    return content


def _all_numbers(row: Mapping[str, Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in row.values())
