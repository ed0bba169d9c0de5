"""The verbs for what a store holds. Heavy modules are imported by the verb that runs."""

from typing import Annotated, Literal

import typer

from stillhouse.jobs.process import AsJson, VerbOutput, verb

Form = Literal["text", "tokens", "megatron", "mds", "hub"]
Address = Annotated[
    str | None, typer.Option(metavar="URL", help="Of a job: the cluster's dashboard.")
]
InStore = Annotated[
    str | None, typer.Option(help="Where an id is looked up; default ./store.", metavar="URI")
]


@verb
def publish(
    name: Annotated[str, typer.Argument(help="A name, or STORE#NAME.", metavar="NAME")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="A number of its history, or a run or selection of the store; "
            "default: what a run published last.",
        ),
    ] = None,
    store: Annotated[str, typer.Option(help="The store that the name is in.")] = "./store",
) -> VerbOutput:
    """Let a published name stand for another version, under a new number.

    After a roll-back the name stays where it is until a run of its spec makes something new.

    Example: `stillhouse publish books-daily --to 3 --store s3://bucket/prefix`
    """
    from stillhouse.jobs.publish import publish_by_hand
    from stillhouse.jobs.summary import show_published

    return VerbOutput(publish_by_hand(name, to, store), show_published)


@verb
def prune(
    uri: Annotated[str, typer.Argument(help="A store.", metavar="STORE")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only look.")] = False,
    grace_hours: Annotated[
        float, typer.Option(help="Remove nothing younger; a run silent for longer is dead.", min=0)
    ] = 24.0,
) -> VerbOutput:
    """Remove what no finished run, pin or published name refers to. Only looks unless `--yes`.

    To let go of what a run made, remove its folder in `runs/` first.

    Example: `stillhouse prune ./store --yes`
    """
    from stillhouse.jobs.prune import prune_store
    from stillhouse.jobs.summary import show_pruned

    return VerbOutput(prune_store(uri, grace_hours=grace_hours, yes=yes), show_pruned)


@verb
def report(
    uri: Annotated[str, typer.Argument(help="A run, or its id.", metavar="RUN")],
    store: InStore = None,
) -> VerbOutput:
    """Draw a finished run's report again; prints where the page is.

    Example: `stillhouse report store/runs/0123abc...`
    """
    from stillhouse.jobs.ids import resolve
    from stillhouse.jobs.status import draw_report

    page = draw_report(resolve(uri, store, ["runs"]))
    return VerbOutput({"report": page}, lambda result: print(result["report"]))


@verb
def stop(
    uri: Annotated[str, typer.Argument(help="A run, or the id of a run or submitted job.")],
    address: Address = None,
    store: InStore = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the driver.", min=0)] = 120.0,
) -> VerbOutput:
    """End a run that is at work, on whatever machine; the same command goes on with it later.

    Example: `stillhouse stop s3://bucket/prefix/runs/0123abc...`
    """
    from stillhouse.jobs.stop import stop_run
    from stillhouse.jobs.summary import show_stopped

    found = stop_run(uri, address, store, wait)
    goes_on = found["state"] in ("running", "PENDING", "RUNNING")
    return VerbOutput(found, show_stopped, 1 if goes_on else 0)


@verb
def logs(
    uri: Annotated[str, typer.Argument(help="A run, or the id of a run or submitted job.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on to its end.")] = False,
    address: Address = None,
    store: InStore = None,
    as_json: AsJson = False,
) -> VerbOutput:
    """Show the events of a run, which its store keeps, or the output of a submitted job.

    Example: `stillhouse logs store/runs/0123abc... --follow`
    """
    from stillhouse.jobs.logs import show_logs

    def write(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    found = show_logs(uri, address, store, follow=follow, write=write)
    return VerbOutput(found, lambda _: None)


@verb
def verify(
    uri: Annotated[
        str,
        typer.Argument(
            help="A run, an artifact (selection, model, ...), STORE#NAME, a store, or an id.",
            metavar="RUN_OR_STORE",
        ),
    ],
    sample: Annotated[int, typer.Option(min=0, help="Scores to recompute with the models.")] = 64,
    store: InStore = None,
) -> VerbOutput:
    """Check every byte that a result rests on, or that a store holds; reads all of it.

    Of a selection also a sample of the scores, recomputed, and the fate of every row.

    Example: `stillhouse verify store/runs/0123abc... --sample 256`
    """
    from stillhouse.jobs.ids import ARTIFACTS, resolve
    from stillhouse.jobs.summary import show_verification
    from stillhouse.jobs.verify import verify as check

    found = check(resolve(uri, store, ARTIFACTS), sample)
    return VerbOutput(found, show_verification, 3 if found["problems"] else 0)


@verb
def diff(
    a: Annotated[str, typer.Argument(help="A run, a selection, STORE#NAME, or an id.")],
    b: Annotated[str, typer.Argument(help="Another one, of any store.")],
    rows: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write what only one keeps, as Parquet."),
    ] = None,
    store: InStore = None,
) -> VerbOutput:
    """Compare two selections: what both keep, what one alone keeps, by source and score.

    Example: `stillhouse diff 0123abcd "./store#books-daily"`
    """
    from stillhouse.jobs.ids import resolve
    from stillhouse.jobs.summary import show_difference
    from stillhouse.reading.difference import compare
    from stillhouse.reading.readers import open_selection

    sides = [open_selection(resolve(one, store, ["runs", "selections"])) for one in (a, b)]
    return VerbOutput(compare(sides[0], sides[1], rows), show_difference)


@verb
def export(
    uri: Annotated[
        str,
        typer.Argument(help="A run, a selection, STORE#NAME, or an id.", metavar="SELECTION"),
    ],
    to: Annotated[str, typer.Option(metavar="DIR", help="A folder or URI, new or empty.")],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="text: JSON Lines or Parquet; tokens: .npy; megatron: .bin and .idx; mds: "
            "MosaicML's shards; hub: a data set with a card.",
        ),
    ],
    files: Annotated[
        Literal["jsonl", "parquet"] | None, typer.Option(help="Of `text`; default jsonl.")
    ] = None,
    shard_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens in a file, at the least a part's."),
    ] = None,
    store: InStore = None,
    as_json: AsJson = False,
) -> VerbOutput:
    """Write a selection for another tool, with where each sample comes from. Again: go on.

    Example: `stillhouse export 0123abcd --to s3://bucket/train --format megatron`
    """
    from stillhouse.export.formats import find_format
    from stillhouse.jobs.export import export_selection
    from stillhouse.jobs.ids import resolve
    from stillhouse.jobs.progress import listener
    from stillhouse.jobs.summary import show_exported

    selection = resolve(uri, store, ["runs", "selections"])
    shown = listener(quiet=as_json)
    try:
        found = export_selection(selection, to, find_format(form, files), shown, shard_tokens)
    finally:
        shown.close()
    return VerbOutput(found, show_exported)


@verb
def recommend(
    runs: Annotated[
        list[str], typer.Argument(help="Records of sweeps, one a task.", metavar="SWEEP_RUN...")
    ],
    features: Annotated[
        str | None,
        typer.Option(help="A YAML file, `RUN: {num_examples: 400}`; `new:` is the new task."),
    ] = None,
    store: InStore = None,
) -> VerbOutput:
    """Recommend a setting for a new task, from sweeps over the same settings on at least three.

    Each task is left out once, to tell what a recommendation is worth.

    Example: `stillhouse recommend 0123abcd 4567cdef 89ab0123`
    """
    from stillhouse.jobs.recommend import recommend as find
    from stillhouse.jobs.summary import show_recommendation

    return VerbOutput(find(runs, store, features), show_recommendation)


VERBS = (stop, logs, publish, prune, report, verify, diff, export, recommend)
