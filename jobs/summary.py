"""What the verbs show on a terminal: tables, and the next command to type."""

import shlex
from typing import Any

from stillhouse.errors import ArtifactError
from stillhouse.report.blocks import Cell, Table
from stillhouse.report.formatting import compact, decimals, num_bytes, words
from stillhouse.report.page import read
from stillhouse.report.terminal import Terminal, styled

_MAX_VERSIONS = 3
_AMOUNTS = ("tokens", "calls", "gradient_passes", "epochs", "iterations", "bytes")
"""Keys of a planned step that say how much work it is."""
_RECOMMENDED = ("metric", "best", "mean", "regret", "gain")
_PUBLISHED = ("selection", "model", "distilled", "generated")


def show_result(result: dict[str, Any]) -> None:
    """What the job made, from its stored report, and where to look."""
    console = Terminal()
    if result["status"] == "nothing_to_do":
        what = ": this spec and these inputs have a finished run"
        console.print(styled(("nothing to do", "green"), what))
    warnings = list(result["warnings"])
    try:
        console.show(read(result.get("sweep", result)["run"]))
    except (FileNotFoundError, ArtifactError) as error:
        warnings.insert(0, error)
    for warning in warnings:
        console.say(("warning:", "yellow"), f" {warning}")
    if "published" in result:
        console.say(_published_line(result["published"]))
    for name in _PUBLISHED:
        if name in result["artifacts"]:
            console.say(f"{name + ': ':<8}{result['artifacts'][name]}")
    console.say(f"report: {result['report']}")
    _print_next(console, "verify", result["run"])


def _print_next(console: Terminal, *command: str) -> None:
    """The next command to type, safe to paste into a shell."""
    console.say(f"next:   {shlex.join(['stillhouse', *command])}")


def show_plan(planned: dict[str, Any]) -> None:
    """Every step with what it would cost."""
    console = Terminal()
    rows: list[list[Cell]] = []
    for name, step in planned["steps"].items():
        work = [f"{compact(step[key])} {words(key)}" for key in _AMOUNTS if step.get(key)]
        parts, seconds = ("?" if step[key] is None else step[key] for key in ("parts", "seconds"))
        rows.append([name, parts, step["reused"], ", ".join(work), step["flops"], seconds])
    columns = {"step": "text", "parts": "number", "reused": "number", "work": "text"}
    columns |= {"compute": "flops", "time": "duration"}
    console.block(Table(columns, rows, f"plan of {planned['job']}"))
    for note in planned["notes"]:
        console.say(note)


def show_stopped(found: dict[str, Any]) -> None:
    """What became of a run that was asked to stop."""
    console, what = Terminal(), found["run"] or f"job {found['job_id']}"
    if found["was"] == found["state"]:
        over = found["state"] not in ("running", "PENDING", "RUNNING")
        said = "nothing to stop" if over else "it was asked to stop and still goes on"
        console.say(f"{what} is {found['state']}: {said}")
    else:
        console.say(f"{what} is {found['state']}: run the same command again to go on")


def show_difference(found: dict[str, Any]) -> None:
    """How much two selections have in common, by source, and which settings differ."""
    console = Terminal()
    kept, unit = found["kept"], found["unit"]
    console.say(
        f"{kept['both']:,} {unit} are in both, {kept['only_a']:,} in a alone, "
        f"{kept['only_b']:,} in b alone"
    )
    if found["rank_correlation"] is not None:
        correlation = decimals(found["rank_correlation"])
        console.say(f"scores of those in both: rank correlation {correlation}")
    names = ["a_tokens", "b_tokens", "a_only_tokens", "b_only_tokens"]
    columns = {"source": "text", "tokens of a": "compact", "of b": "compact"}
    columns |= {"in a alone": "compact", "in b alone": "compact"}
    rows: list[list[Cell]] = [
        [row["source"], *(row[name] for name in names)] for row in found["sources"]
    ]
    console.block(Table(columns, rows, "by source"))
    for name, (a, b) in found["settings"].items():
        if not isinstance(a, dict) and not isinstance(b, dict):
            console.say(f"{name}: {a} in a, {b} in b")


def show_exported(found: dict[str, Any]) -> None:
    """What an export holds and where it is."""
    console = Terminal()
    if found["reused"] == found["shards"]:
        console.print(styled(("nothing to do", "green"), ": this export is complete"))
    samples, tokens, size = found["num_samples"], found["num_tokens"], num_bytes(found["bytes"])
    console.say(f"{samples:,} {found['grain']}, {compact(tokens)} tokens, {size} in {found['to']}")


def show_recommendation(found: dict[str, Any]) -> None:
    """What the others recommend for each task, and what all recommend for a new one."""
    console = Terminal()
    rows: list[list[Cell]] = [
        [one["name"], settings_text(one["setting"]), *(one[key] for key in _RECOMMENDED)]
        for one in found["tasks"]
    ]
    columns = {"task left out": "text", "recommended by the others": "text"}
    columns |= dict.fromkeys(_RECOMMENDED, "decimals4")
    console.block(Table(columns, rows, f"{found['metric']} ({found['mode']})"))
    regret, gain = found["mean_regret"], found["mean_gain"]
    console.say(
        f"on average {regret:.4g} worse than the best setting of the grid, and "
        f"{abs(gain):.4g} {'better' if gain >= 0 else 'worse'} than its mean"
    )
    if found["recommended"] is not None:
        console.say("for a new task: ", (settings_text(found["recommended"]), "bold"))


def settings_text(setting: dict[str, Any]) -> str:
    """`train.learning_rate 0.01, train.global_batch 8`."""
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def show_status(found: dict[str, Any]) -> None:
    """A run's steps, a name's history, or the runs, names and artifacts of a store."""
    console = Terminal()
    if "versions" in found:
        _show_names(console, [found], len(found["versions"]))
    elif "runs" in found:
        _show_store(console, found)
    else:
        _show_run(console, found)


def _show_run(console: Terminal, run: dict[str, Any]) -> None:
    open_ended = run["state"] in {"running", "lost"}
    since = f", last heard of at {run['updated']}" if open_ended else ""
    named = f" ({run['name']})" if run.get("name") else ""
    console.say(f"{run['job']} run {run['run'][:12]}{named}: ", (run["state"], "bold"), since)
    if run["state"] in {"lost", "stopped"}:
        console.say("run or submit the same spec again to go on")
    for attempt in run.get("earlier", []):
        console.say(f"attempt {_attempt_text(attempt)}")
    if run.get("error"):
        console.say((f"{_failed_at(run)}{run['error']}", "red"))
    keys = {"state": "text", **dict.fromkeys(("parts", "done", "reused", "seconds"), "number")}
    rows = [[name, *(step.get(key) for key in keys)] for name, step in run["steps"].items()]
    console.block(Table({"step": "text"} | keys, rows))


def show_job(job: dict[str, Any]) -> None:
    """What Ray says of a submitted job, then its run as the store has it."""
    console = Terminal()
    cluster, run = job["cluster"], job["run"]
    if cluster is not None:
        console.say(f"job {job['job_id']} at {cluster['address']}: ", (cluster["state"], "bold"))
        if cluster["error"] and not (run or {}).get("error"):
            console.say((cluster["error"], "red"))
    else:
        console.say(f"job {job['job_id']}: {job['why_not']}; from its store:")
    if run is not None:
        if "was" in run:
            console.say(f"it made attempt {_attempt_text(run['was'])}; the run now:")
        show_status(run)


def _attempt_text(attempt: dict[str, Any]) -> str:
    """`2, begun at ...: failed at step score prior: ...`."""
    error = f": {_failed_at(attempt)}{attempt['error']}" if attempt["error"] else ""
    return f"{attempt['attempt']}, begun at {attempt['started']}: {attempt['state']}{error}"


def _failed_at(attempt: dict[str, Any]) -> str:
    """`step score prior, part 0123..., node 10.0.0.7: `, as far as it is known."""
    failed = attempt.get("failed_at") or {}
    named = [f"{key} {failed[key]}" for key in ("step", "part", "node") if failed.get(key)]
    return f"{', '.join(named)}: " if named else ""


def _show_store(console: Terminal, store: dict[str, Any]) -> None:
    keys = ("run", "name", "job", "state", "updated")
    runs = [
        [(row | {"run": row["run"][:12]}).get(key) or "" for key in keys] for row in store["runs"]
    ]
    console.block(Table(dict.fromkeys(keys, "text"), runs, f"runs in {store['store']}"))
    if store["names"]:
        _show_names(console, store["names"], _MAX_VERSIONS)
    rows: list[list[Cell]] = []
    for row in store["artifacts"]:
        labels = [label.partition("/") for label in row["referred_by"]]
        text = ", ".join(f"{kind}/{name[:12]}" for kind, _, name in labels[:2]) or "nothing"
        text += f" and {len(labels) - 2} more" if len(labels) > 2 else ""
        age = age_text(row["age_s"])
        rows.append([row["kind"], row["fingerprint"][:12], row["bytes"], age, text])
    columns = {"kind": "text", "artifact": "text", "size": "bytes", "age": "number"}
    console.block(Table(columns | {"referred to by": "text"}, rows, "artifacts"))


def age_text(seconds: float) -> str:
    """`3 h`: the largest unit of which there are two."""
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds // limit:.0f} {unit}"
    return f"{seconds:.0f} s"


def _show_names(console: Terminal, named: list[dict[str, Any]], most: int) -> None:
    """The newest versions of each name, the current one first."""
    rows: list[list[Cell]] = []
    for row in named:
        for place, version in enumerate(reversed(row["versions"][-most:])):
            again = f"again version {version['again']}" if version["again"] else ""
            note = again if place else f"current {again}"
            what, when = version["selection"][:12], version["published"] or ""
            rows.append([row["name"] if not place else "", version["version"], what, when, note])
    columns = {"name": "text", "version": "number", "selection": "text", "published": "text"}
    console.block(Table(columns | {"": "text"}, rows, "published names"))


def show_published(found: dict[str, Any]) -> None:
    """What a name stands for now."""
    console = Terminal()
    console.say(_published_line(found))
    _print_next(console, "status", f"{found['store']}#{found['name']}")


def _published_line(found: dict[str, Any]) -> str:
    verb = "is now" if found["new"] else "stays at"
    again = f" (again version {found['again']})" if found["again"] else ""
    what = next(found[kind] for kind in _PUBLISHED if kind in found)
    return f"{found['name']} {verb} version {found['version']}{again}: {what}"


def show_changes(run: dict[str, Any], changed: list[str]) -> None:
    """A line for each step of a followed run that changed."""
    console = Terminal()
    for name in changed:
        step = run["steps"][name]
        line = f"{run['updated']}  {name}: {step.get('done', 0):g} of {step.get('parts', 0)}"
        done = step.get("state") == "done"
        console.say(f"{line}, done in {step['seconds']:.1f} s" if done else line)


def show_pruned(found: dict[str, Any]) -> None:
    """What was removed, or would be."""
    console = Terminal()
    gone = found["unreachable"] if found["dry"] else found["removed"]
    rows = [[kind, sums["objects"], sums["bytes"]] for kind, sums in gone.items()]
    if gone:
        title = "would be removed" if found["dry"] else "removed"
        console.block(Table({"kind": "text", "objects": "number", "size": "bytes"}, rows, title))
    else:
        console.say("nothing to remove")
    for run in found["live_runs"]:
        console.say(f"run {run[:12]} is live: meanwhile only temporary files are removed")
    if found["dry"] and gone:
        _print_next(console, "prune", found["store"], "--yes")


def show_verification(found: dict[str, Any]) -> None:
    """What was checked, and everything that is wrong."""
    console = Terminal()
    for name, count in found["checked"].items():
        if count:
            console.say(f"checked {count:,} {name}")
    for problem in found["problems"]:
        console.say(("problem:", "red"), f" {problem}")
    if not found["problems"]:
        console.say(("all as the manifests say", "green"))
