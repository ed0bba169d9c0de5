"""The result of a chain: each step's own numbers and headline, the cost of all, and the lineage."""

from collections.abc import Mapping, Sequence
from typing import Any

import stillhouse.report.blocks as b
from stillhouse.jobs.chain_spec import ChainSpec
from stillhouse.jobs.steps import StepResult
from stillhouse.pipelines.context import Context, Listener
from stillhouse.pipelines.results import assemble, cost_numbers
from stillhouse.report.formatting import duration
from stillhouse.report.page import read
from stillhouse.storage.artifact import Store

_COMMON = {"status", "job", "run", "report", "artifacts", "work", "warnings", "published"}


def chain_numbers(steps: Mapping[str, StepResult]) -> dict[str, Any]:
    """`chain` of `run --json`: of each step its run, status, artifact and own numbers."""
    return {
        "chain": {
            "steps": {
                name: {"run": step.result["run"], "status": step.status, "artifact": step.artifact}
                | {key: value for key, value in step.result.items() if key not in _COMMON}
                for name, step in steps.items()
            }
        }
    }


def chain_result(
    spec: ChainSpec,
    needs: Mapping[str, Sequence[str]],
    steps: Mapping[str, StepResult],
    store: Store,
    run_uri: str,
) -> b.Result:
    """The result of a chain whose steps are all finished."""
    steps = {name: steps[name] for name in needs}
    ctx = Context(store, spec.compute, Listener())
    ctx.work = {name: step.work for name, step in steps.items()}
    headlines = {name: _headline(step.result["run"]) for name, step in steps.items()}
    warnings = [
        b.Warn(f"{name}: {text}")
        for name, step in steps.items()
        for text in step.result["warnings"]
    ]
    fresh = [name for name, step in steps.items() if step.status == "done"]
    tiles = [
        b.Fact("Steps", str(len(steps)), f"{len(steps) - len(fresh)} reused", main=True),
        b.Fact("Time", duration(sum(step.seconds for step in steps.values())), "of this run"),
    ]
    last = [*steps][-1]
    if headlines[last]:
        fact = headlines[last][0]
        tiles.append(b.Fact(f"{fact.name}, {last}", fact.value, fact.note, main=True))
    nodes = [
        b.Node(
            name,
            step.result["job"],
            "; ".join(f"{fact.name} {fact.value}" for fact in headlines[name][:2]),
            f"../{step.result['run'].rsplit('/', 1)[-1]}/report.html",
            [*needs[name]],
        )
        for name, step in steps.items()
    ]
    rows: list[list[b.Cell]] = [
        [node.name, node.job, steps[node.name].status, node.headline] for node in nodes
    ]
    columns = {"step": "text", "job": "text", "status": "text", "result": "text"}
    lineage = b.Lineage("Each step links to its own report.", nodes)
    return assemble(
        ctx,
        spec,
        "chain",
        run_uri,
        title=" → ".join(steps),
        artifacts={name: step.artifact for name, step in steps.items()},
        numbers=chain_numbers(steps) | {"cost": cost_numbers(ctx.work)},
        warnings=b.Warnings(warnings, "Those of all steps were looked at."),
        lead=[b.Facts(tiles)],
        sections=[b.Section("steps", "Steps", [lineage, b.Table(columns, rows, terminal=True)])],
    )


def _headline(run: str) -> list[b.Fact]:
    """The main numbers of a step's own report."""
    facts = [fact for block in read(run).find("lead", "facts") for fact in block.facts]
    return [fact for fact in facts if fact.main] or facts[:1]
