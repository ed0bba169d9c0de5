"""Tables on the terminal: what a verb found, and the next command to type."""

import shlex
from typing import Any

from rich.table import Table

from stillhouse.jobs.terminal import Terminal, styled

_MAX_SOURCES = 12
_MAX_VERSIONS = 3
_AMOUNTS = (
    ("tokens", "tokens"),
    ("gradient_passes", "gradient passes"),
    ("epochs", "epochs"),
    ("iterations", "iterations"),
)
"""Keys of a planned step that say how much there is to do."""
_PUBLISHED = ("selection", "model", "distilled")


def _print_next(console: Terminal, *words: str) -> None:
    """The next command to type, safe to paste into a shell."""
    command = shlex.join(["stillhouse", *words])
    console.print(f"next:   {command}", soft_wrap=True)


def tokens_text(count: float) -> str:
    """`12.3 M`."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {prefix}"
    return f"{count:.0f}"


def show_result(result: dict[str, Any]) -> None:
    """What the job made, and where to look."""
    console = Terminal()
    if result["status"] == "nothing_to_do":
        what = ": this spec and these inputs have a finished run"
        console.print(styled(("nothing to do", "green"), what))
    _RESULTS[result["job"]](console, result)
    for warning in result["warnings"]:
        console.print(styled(("warning:", "yellow"), f" {warning}"), soft_wrap=True)
    if "published" in result:
        console.print(_published_line(result["published"]), soft_wrap=True)
    console.print(f"report: {result['report']}", soft_wrap=True)
    _print_next(console, "verify", result["run"])


def _show_selection(console: Terminal, result: dict[str, Any]) -> None:
    """What was kept of each source, and the targets' losses."""
    kept = result["selection"]
    told = f" rows, {tokens_text(kept['num_tokens'])} tokens, score at the cut "
    count = f"{kept['num_sequences']:,}"
    console.print(styled("kept ", (count, "bold"), f"{told}{kept['threshold']:.4f}"))
    console.print(_sources_table(kept["sources"]))
    if result["target"]:
        console.print(_targets_table(result["target"]))


def _show_training(console: Terminal, result: dict[str, Any]) -> None:
    """The model's losses, and how the training went."""
    found = result["train"]
    heldout = found["heldout_nll"]
    said = f"trained {found['num_steps']:,} steps on {tokens_text(found['num_tokens'])} tokens"
    loss = f", held-out loss {heldout:.4f} nats a token" if heldout is not None else ""
    console.print(said + loss)
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    console.print(
        f"{tokens_text(found['tokens_per_second'])} tokens/s{mfu}, waited for data "
        f"{found['data_wait_share']:.1%} of the time, {found['restarts']} restarts"
    )
    console.print(f"model:  {result['artifacts']['model']}", soft_wrap=True)


def _show_mix(console: Terminal, result: dict[str, Any]) -> None:
    """Policies and controls, the best first."""
    table = Table(title="on the target's test rows, over seeds", title_justify="left")
    table.add_column("policy")
    for name in ("held-out loss", "accuracy", "gradient passes"):
        table.add_column(name, justify="right")
    rows = {label: list(found["seeds"].values()) for label, found in result["mix"].items()}
    for label, seeds in sorted(rows.items(), key=lambda row: _mean(row[1], "heldout_nll")):
        told = all(seed["accuracy"] is not None for seed in seeds)
        accuracy = f"{_mean(seeds, 'accuracy'):.3f}" if told else ""
        passes = f"{_mean(seeds, 'gradient_passes'):,.0f}"
        cells = (label, f"{_mean(seeds, 'heldout_nll'):.4f}", accuracy, passes)
        table.add_row(*cells, style="bold" if label == next(iter(rows)) else None)
    console.print(table)
    chance = next(seed for of in rows.values() for seed in of).get("chance")
    if chance is not None:
        console.print(f"accuracy of a guess among the choices: {chance:.3f}")


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _show_distilled(console: Terminal, result: dict[str, Any]) -> None:
    """The set's bytes and accuracy beside the controls'."""
    made = result["distill"]
    console.print(
        f"{made['images_per_class']} images per class by {made['method']}, "
        f"{bytes_text(made['bytes'])}, validation accuracy {made['validation_accuracy']:.3f}"
    )
    table = Table(title="test accuracy", title_justify="left")
    table.add_column("set")
    for name in ("bytes", "mean", "std", "seeds"):
        table.add_column(name, justify="right")
    rows = {made["method"]: made} | made["controls"]
    for name, row in rows.items():
        found = row["test_accuracy"]
        numbers = f"{found['mean']:.4f}", f"{found['std']:.4f}", str(found["seeds"])
        table.add_row(name.replace("_", " "), bytes_text(row["bytes"]), *numbers)
    console.print(table)


_RESULTS = {
    "select": _show_selection,
    "train": _show_training,
    "mix": _show_mix,
    "distill": _show_distilled,
}
"""By job: prints what a result holds."""


def _sources_table(sources: dict[str, dict[str, int]]) -> Table:
    table = Table(title="what was kept", title_justify="left")
    table.add_column("source")
    for name in ("pool", "kept", "of pool", "of selection", "ratio"):
        table.add_column(name, justify="right")
    pool = sum(s["pool_tokens"] for s in sources.values()) or 1
    kept = sum(s["kept_tokens"] for s in sources.values()) or 1
    order = sorted(sources.items(), key=lambda item: (-item[1]["kept_tokens"], item[0]))
    for name, source in order[:_MAX_SOURCES]:
        shares = source["pool_tokens"] / pool, source["kept_tokens"] / kept
        table.add_row(
            name,
            tokens_text(source["pool_tokens"]),
            tokens_text(source["kept_tokens"]),
            f"{shares[0]:.1%}",
            f"{shares[1]:.1%}",
            f"{shares[1] / shares[0]:.2f}" if shares[0] else "",
        )
    if len(order) > _MAX_SOURCES:
        table.add_row(f"and {len(order) - _MAX_SOURCES} more", "", "", "", "", "")
    return table


def _targets_table(targets: dict[str, Any]) -> Table:
    seeds = max(len(row["heldout_nll_by_seed"]) for row in targets.values())
    said = "one seed: how much is chance is not known" if seeds == 1 else f"mean of {seeds} seeds"
    title = f"held-out loss of the target model ({said})"
    table = Table(title=title, title_justify="left")
    table.add_column("trained on")
    for name in ("tokens", "nats per token", "against random"):
        table.add_column(name, justify="right")
    base = targets.get("random", {}).get("heldout_nll")
    for name, row in sorted(targets.items(), key=lambda item: item[1]["heldout_nll"]):
        against = f"{row['heldout_nll'] - base:+.4f}" if base is not None else ""
        table.add_row(name, tokens_text(row["num_tokens"]), f"{row['heldout_nll']:.4f}", against)
    return table


def show_plan(planned: dict[str, Any]) -> None:
    """Every step with what it would cost."""
    console = Terminal()
    table = Table(title=f"plan of {planned['job']}", title_justify="left")
    table.add_column("step")
    for name in ("parts", "reused", "work", "FLOPs", "seconds"):
        table.add_column(name, justify="right")
    for name, step in planned["steps"].items():
        seconds = step["seconds"]
        amounts = [f"{tokens_text(step[key])} {words}" for key, words in _AMOUNTS if step.get(key)]
        table.add_row(
            name,
            f"{step['parts']:,}" if step["parts"] is not None else "?",
            f"{step['reused']:,}",
            ", ".join(amounts),
            f"{step['flops']:.2e}" if step["flops"] else "",
            f"{seconds:,.0f}" if seconds is not None else "?",
        )
    console.print(table)
    for note in planned["notes"]:
        console.print(note, soft_wrap=True)


def bytes_text(count: float) -> str:
    """`12.3 MB`."""
    return f"{tokens_text(count)}B" if count >= 1000 else f"{count:.0f} B"


def age_text(seconds: float) -> str:
    """`3 h`: the largest unit of which there are two."""
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds // limit:.0f} {unit}"
    return f"{seconds:.0f} s"


def show_status(found: dict[str, Any]) -> None:
    """A run's steps, a name's history, or the runs, names and artifacts of a store."""
    console = Terminal()
    if "versions" in found:
        console.print(_names_table([found], len(found["versions"])))
        return
    if "runs" in found:
        console.print(_runs_table(found))
        if found["names"]:
            console.print(_names_table(found["names"], _MAX_VERSIONS))
        console.print(_artifacts_table(found["artifacts"]))
        return
    open_ended = found["state"] in {"running", "lost"}
    since = f", last heard of at {found['updated']}" if open_ended else ""
    named = f" ({found['name']})" if found.get("name") else ""
    head = f"{found['job']} run {found['run'][:12]}{named}: "
    console.print(styled(head, (found["state"], "bold"), since), soft_wrap=True)
    if found["state"] in {"lost", "stopped"}:
        console.print("run or submit the same spec again to go on")
    for one in found.get("earlier", []):
        console.print(f"attempt {_attempt_text(one)}", soft_wrap=True)
    if found.get("error"):
        said = f"{_failed_at(found)}{found['error']}"
        console.print(said, style="red", soft_wrap=True)
    table = Table()
    table.add_column("step")
    for name in ("state", "parts", "done", "reused", "seconds"):
        table.add_column(name, justify="right")
    for name, step in found["steps"].items():
        cells = [step.get(key, "") for key in ("state", "parts", "done", "reused", "seconds")]
        table.add_row(name, *(str(cell) for cell in cells))
    console.print(table)


def show_job(found: dict[str, Any]) -> None:
    """What Ray says of a submitted job, then its run as the store has it."""
    console = Terminal()
    said = found["cluster"]
    if said is not None:
        head = f"job {found['job_id']} at {said['address']}: "
        console.print(styled(head, (said["state"], "bold")), soft_wrap=True)
        if said["error"] and not (found["run"] or {}).get("error"):
            console.print(said["error"], style="red", soft_wrap=True)
    else:
        said = f"job {found['job_id']}: {found['why_not']}; from its store:"
        console.print(said, soft_wrap=True)
    if found["run"] is not None:
        if "was" in found["run"]:
            was = _attempt_text(found["run"]["was"])
            console.print(f"it made attempt {was}; the run now:", soft_wrap=True)
        show_status(found["run"])


def _attempt_text(one: dict[str, Any]) -> str:
    """`2, begun at ...: failed at step score prior: ...`."""
    error = f": {_failed_at(one)}{one['error']}" if one["error"] else ""
    return f"{one['attempt']}, begun at {one['started']}: {one['state']}{error}"


def _failed_at(found: dict[str, Any]) -> str:
    """`step score prior, part 0123..., node 10.0.0.7: `, as far as it is known."""
    failed = found.get("failed_at") or {}
    named = [f"{key} {failed[key]}" for key in ("step", "part", "node") if failed.get(key)]
    return f"{', '.join(named)}: " if named else ""


def _runs_table(found: dict[str, Any]) -> Table:
    table = Table(title=f"runs in {found['store']}", title_justify="left")
    keys = ("run", "name", "job", "state", "updated")
    for key in keys:
        table.add_column(key)
    for row in found["runs"]:
        cells = row | {"run": row["run"][:12]}
        table.add_row(*(str(cells.get(key) or "") for key in keys))
    return table


def _names_table(named: list[dict[str, Any]], most: int) -> Table:
    """The newest versions of each name, the current one first."""
    table = Table(title="published names", title_justify="left")
    for title in ("name", "version", "selection", "published", ""):
        table.add_column(title)
    for row in named:
        for place, version in enumerate(reversed(row["versions"][-most:])):
            again = f"again version {version['again']}" if version["again"] else ""
            table.add_row(
                row["name"] if place == 0 else "",
                str(version["version"]),
                version["selection"][:12],
                version["published"] or "",
                styled(("current ", "green"), again) if place == 0 else again,
            )
    return table


def show_published(found: dict[str, Any]) -> None:
    """What a name stands for now."""
    console = Terminal()
    console.print(_published_line(found), soft_wrap=True)
    _print_next(console, "status", f"{found['store']}#{found['name']}")


def _published_line(found: dict[str, Any]) -> str:
    verb = "is now" if found["new"] else "stays at"
    again = f" (again version {found['again']})" if found["again"] else ""
    what = next(found[kind] for kind in _PUBLISHED if kind in found)
    return f"{found['name']} {verb} version {found['version']}{again}: {what}"


def _artifacts_table(artifacts: list[dict[str, Any]]) -> Table:
    table = Table(title="artifacts", title_justify="left")
    table.add_column("kind")
    table.add_column("artifact")
    for name in ("size", "age"):
        table.add_column(name, justify="right")
    table.add_column("referred to by")
    for row in artifacts:
        labels = [_short(label) for label in row["referred_by"]]
        more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
        referred = ", ".join(labels[:2]) + more if labels else styled(("nothing", "yellow"))
        size, age = bytes_text(row["bytes"]), age_text(row["age_s"])
        table.add_row(row["kind"], row["fingerprint"][:12], size, age, referred)
    return table


def _short(label: str) -> str:
    kind, _, name = label.partition("/")
    return f"{kind}/{name[:12]}"


def show_changes(found: dict[str, Any], changed: list[str]) -> None:
    """A line for each step of a followed run that changed."""
    console = Terminal()
    for name in changed:
        step = found["steps"][name]
        line = f"{found['updated']}  {name}: {step.get('done', 0):g} of {step.get('parts', 0)}"
        done = step.get("state") == "done"
        console.print(f"{line}, done in {step['seconds']:.1f} s" if done else line, soft_wrap=True)


def show_pruned(found: dict[str, Any]) -> None:
    """What was removed, or would be."""
    console = Terminal()
    table = Table(title="would be removed" if found["dry"] else "removed", title_justify="left")
    table.add_column("kind")
    for name in ("objects", "size"):
        table.add_column(name, justify="right")
    gone = found["unreachable"] if found["dry"] else found["removed"]
    for kind, sums in gone.items():
        table.add_row(kind, f"{sums['objects']:,}", bytes_text(sums["bytes"]))
    console.print(table if gone else "nothing to remove")
    for run in found["live_runs"]:
        console.print(f"run {run[:12]} is at work: only leftovers of writers go while it is")
    if found["dry"] and gone:
        _print_next(console, "prune", found["store"], "--yes")


def show_verification(found: dict[str, Any]) -> None:
    """What was checked, and everything that is wrong."""
    console = Terminal()
    counts = {name: count for name, count in found["checked"].items() if count}
    for name, count in counts.items():
        console.print(f"checked {count:,} {name}")
    for problem in found["problems"]:
        console.print(styled(("problem:", "red"), f" {problem}"), soft_wrap=True)
    if not found["problems"]:
        console.print(styled(("all as the manifests say", "green")))
