"""What the verbs show on a terminal: tables, and the next command to type."""

import shlex
from typing import Any

from rich.text import Text

from stillhouse.errors import ArtifactError
from stillhouse.report.formatting import words
from stillhouse.report.page import read
from stillhouse.report.terminal import Terminal, styled

_MAX_VERSIONS = 3
_AMOUNTS = ("tokens", "gradient_passes", "epochs", "iterations")
"""Keys of a planned step that say how much there is to do."""
_PUBLISHED = ("selection", "model", "distilled")


def _print_next(console: Terminal, *command: str) -> None:
    """The next command to type, safe to paste into a shell."""
    console.say(f"next:   {shlex.join(['stillhouse', *command])}")


def _numbers(first: str, *others: str) -> dict[str, str]:
    return {first: "left", **dict.fromkeys(others, "right")}


def tokens_text(count: float) -> str:
    """`12.3 M`."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {prefix}"
    return f"{count:.0f}"


def bytes_text(count: float) -> str:
    """`12.3 MB`."""
    return f"{tokens_text(count)}B" if count >= 1000 else f"{count:.0f} B"


def age_text(seconds: float) -> str:
    """`3 h`: the largest unit of which there are two."""
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds // limit:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_result(found: dict[str, Any]) -> None:
    """What the job made, from its stored report, and where to look."""
    console = Terminal()
    if found["status"] == "nothing_to_do":
        what = ": this spec and these inputs have a finished run"
        console.print(styled(("nothing to do", "green"), what))
    try:
        console.show(read(found["run"]))
    except (FileNotFoundError, ArtifactError) as error:
        console.say(("warning:", "yellow"), f" {error}")
    for warning in found["warnings"]:
        console.say(("warning:", "yellow"), f" {warning}")
    if "published" in found:
        console.say(_published_line(found["published"]))
    for name in _PUBLISHED:
        if name in found["artifacts"]:
            console.say(f"{name + ':':<12}{found['artifacts'][name]}")
    console.say(f"report: {found['report']}")
    _print_next(console, "verify", found["run"])


def show_plan(planned: dict[str, Any]) -> None:
    """Every step with what it would cost."""
    console = Terminal()

    def row(name: str, step: dict[str, Any]) -> list[str]:
        work = [f"{tokens_text(step[key])} {words(key)}" for key in _AMOUNTS if step.get(key)]
        return [
            name,
            f"{step['parts']:,}" if step["parts"] is not None else "?",
            f"{step['reused']:,}",
            ", ".join(work),
            f"{step['flops']:.2e}" if step["flops"] else "",
            f"{step['seconds']:,.0f}" if step["seconds"] is not None else "?",
        ]

    columns = _numbers("step", "parts", "reused", "work", "FLOPs", "seconds")
    rows = [row(name, step) for name, step in planned["steps"].items()]
    console.table(columns, rows, f"plan of {planned['job']}")
    for note in planned["notes"]:
        console.say(note)


def show_status(found: dict[str, Any]) -> None:
    """A run's steps, a name's history, or the runs, names and artifacts of a store."""
    console = Terminal()
    if "versions" in found:
        _show_names(console, [found], len(found["versions"]))
    elif "runs" in found:
        _show_store(console, found)
    else:
        _show_run(console, found)


def _show_run(console: Terminal, found: dict[str, Any]) -> None:
    open_ended = found["state"] in {"running", "lost"}
    since = f", last heard of at {found['updated']}" if open_ended else ""
    named = f" ({found['name']})" if found.get("name") else ""
    console.say(f"{found['job']} run {found['run'][:12]}{named}: ", (found["state"], "bold"), since)
    if found["state"] in {"lost", "stopped"}:
        console.say("run or submit the same spec again to go on")
    for one in found.get("earlier", []):
        console.say(f"attempt {_attempt_text(one)}")
    if found.get("error"):
        console.say((f"{_failed_at(found)}{found['error']}", "red"))
    keys = ("state", "parts", "done", "reused", "seconds")
    rows = [[name, *(str(s.get(key, "")) for key in keys)] for name, s in found["steps"].items()]
    console.table(_numbers("step", *keys), rows)


def show_job(found: dict[str, Any]) -> None:
    """What Ray says of a submitted job, then its run as the store has it."""
    console = Terminal()
    cluster, run = found["cluster"], found["run"]
    if cluster is not None:
        console.say(f"job {found['job_id']} at {cluster['address']}: ", (cluster["state"], "bold"))
        if cluster["error"] and not (run or {}).get("error"):
            console.say((cluster["error"], "red"))
    else:
        console.say(f"job {found['job_id']}: {found['why_not']}; from its store:")
    if run is not None:
        if "was" in run:
            console.say(f"it made attempt {_attempt_text(run['was'])}; the run now:")
        show_status(run)


def _attempt_text(one: dict[str, Any]) -> str:
    """`2, begun at ...: failed at step score prior: ...`."""
    error = f": {_failed_at(one)}{one['error']}" if one["error"] else ""
    return f"{one['attempt']}, begun at {one['started']}: {one['state']}{error}"


def _failed_at(found: dict[str, Any]) -> str:
    """`step score prior, part 0123..., node 10.0.0.7: `, as far as it is known."""
    failed = found.get("failed_at") or {}
    named = [f"{key} {failed[key]}" for key in ("step", "part", "node") if failed.get(key)]
    return f"{', '.join(named)}: " if named else ""


def _show_store(console: Terminal, found: dict[str, Any]) -> None:
    keys = ("run", "name", "job", "state", "updated")
    runs = [
        [str((row | {"run": row["run"][:12]}).get(key) or "") for key in keys]
        for row in found["runs"]
    ]
    console.table(dict.fromkeys(keys, "left"), runs, f"runs in {found['store']}")
    if found["names"]:
        _show_names(console, found["names"], _MAX_VERSIONS)
    columns = {"kind": "left", "artifact": "left", "size": "right", "age": "right"}
    artifacts = [
        [
            row["kind"],
            row["fingerprint"][:12],
            bytes_text(row["bytes"]),
            age_text(row["age_s"]),
            _referred(row["referred_by"]),
        ]
        for row in found["artifacts"]
    ]
    console.table(columns | {"referred to by": "left"}, artifacts, "artifacts")


def _referred(labels: list[str]) -> str | Text:
    """`runs/0123..., pins/4567... and 3 more`."""
    shown = [f"{kind}/{name[:12]}" for kind, _, name in (one.partition("/") for one in labels[:2])]
    more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
    return ", ".join(shown) + more if labels else styled(("nothing", "yellow"))


def _show_names(console: Terminal, named: list[dict[str, Any]], most: int) -> None:
    """The newest versions of each name, the current one first."""
    rows: list[list[str | Text]] = []
    for row in named:
        for place, version in enumerate(reversed(row["versions"][-most:])):
            again = f"again version {version['again']}" if version["again"] else ""
            first, said = (row["name"], styled(("current ", "green"), again)), ("", again)
            name, note = said if place else first
            what, when = version["selection"][:12], version["published"] or ""
            rows.append([name, str(version["version"]), what, when, note])
    titles = ("name", "version", "selection", "published", "")
    console.table(dict.fromkeys(titles, "left"), rows, "published names")


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


def show_changes(found: dict[str, Any], changed: list[str]) -> None:
    """A line for each step of a followed run that changed."""
    console = Terminal()
    for name in changed:
        step = found["steps"][name]
        line = f"{found['updated']}  {name}: {step.get('done', 0):g} of {step.get('parts', 0)}"
        done = step.get("state") == "done"
        console.say(f"{line}, done in {step['seconds']:.1f} s" if done else line)


def show_pruned(found: dict[str, Any]) -> None:
    """What was removed, or would be."""
    console = Terminal()
    gone = found["unreachable"] if found["dry"] else found["removed"]
    rows = [[k, f"{sums['objects']:,}", bytes_text(sums["bytes"])] for k, sums in gone.items()]
    if gone:
        title = "would be removed" if found["dry"] else "removed"
        console.table(_numbers("kind", "objects", "size"), rows, title)
    else:
        console.say("nothing to remove")
    for run in found["live_runs"]:
        console.say(f"run {run[:12]} is at work: only leftovers of writers go while it is")
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
