"""The command line, `stillhouse VERB ...`. Heavy modules are imported by the verb that runs."""

import os
import shlex
import sys
from typing import Annotated, Any, Literal

import typer

from stillhouse import __version__
from stillhouse.jobs import process
from stillhouse.jobs.process import AsJson, VerbOutput, verb

app = typer.Typer(
    name="stillhouse",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Select training data at cluster scale, and train on what was kept.

A job is one YAML file:

    stillhouse plan SPEC                # what is done, what is to do

    stillhouse run SPEC                 # do it; again: nothing to do

    stillhouse run SPEC --set selection.tau=16

    stillhouse submit SPEC --address URL --follow   # the same on a cluster

    stillhouse schedule SPEC --cron "0 3 * * *" --kind raycronjob

    stillhouse status ./store           # how far its runs are

    stillhouse verify ./store/runs/...  # every byte, a sample of scores

    stillhouse publish NAME --to 3      # a published name back to its version 3

Exit codes: 0 done (also: nothing to do), 2 bad spec or usage, 3 bad input data,
4 stopped but resumable (run the same command again), 1 anything else.
""",
)

Kind = Literal["raycronjob", "cronjob", "crontab"]
Form = Literal["text", "tokens", "megatron", "mds", "hub"]
Spec = Annotated[str, typer.Argument(help="A YAML file (path or URI).", metavar="SPEC")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one key; VALUE is read as YAML."),
]
Store = Annotated[
    str | None, typer.Option(help="Where an id is looked up; default ./store.", metavar="URI")
]


def _load(spec: str, sets: list[str] | None) -> Any:
    from stillhouse.jobs.spec_file import load_spec

    return load_spec(spec, sets or [])


def _version(requested: bool) -> None:
    if requested:
        print(f"stillhouse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
@verb
def run(spec: Spec, sets: Sets = None, as_json: AsJson = False) -> VerbOutput:
    """Run a job; go on where an earlier run of the same spec stopped.

    Example: `stillhouse run examples/select.yaml --set selection.tau=16`
    """
    from stillhouse.jobs.chain import run_spec
    from stillhouse.jobs.progress import listener
    from stillhouse.jobs.run import SUBMISSION_VARIABLE
    from stillhouse.jobs.summary import show_result

    if SUBMISSION_VARIABLE in os.environ:
        from stillhouse.jobs.submit import warn_of_versions

        warn_of_versions()
    loaded = _load(spec, sets)
    shown = listener(quiet=as_json)
    try:
        return VerbOutput(run_spec(loaded, shown), show_result)
    finally:
        shown.close()


@app.command()
@verb
def plan(spec: Spec, sets: Sets = None) -> VerbOutput:
    """Show every step: reused or to do, with tokens, FLOPs and estimated seconds. Spends nothing.

    Example: `stillhouse plan examples/select.yaml`
    """
    from stillhouse.jobs.chain_plan import plan_spec
    from stillhouse.jobs.summary import show_plan

    return VerbOutput(plan_spec(_load(spec, sets)), show_plan)


@app.command()
@verb
def status(
    uri: Annotated[
        str, typer.Argument(help="A run, a store, STORE#NAME, or the id of a run or submitted job.")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show a run's steps as they change, to its end.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="For a job: the cluster's dashboard.")
    ] = None,
    store: Store = None,
    as_json: AsJson = False,
) -> VerbOutput:
    """Show how far a run is, what a store holds, or a published name's history. Needs no cluster.

    A submitted job is looked up in its cluster while that is there, and in its store.

    Example: `stillhouse status ./store`
    """
    from stillhouse.jobs.status import find, job_status, run_to_follow, show_to_end, status_of
    from stillhouse.jobs.summary import show_changes, show_job, show_status

    job, place = find(uri, address, store)
    if follow:
        followed = run_to_follow(job_status(job, address, store)) if job else place
        show_to_end(followed, None if as_json else show_changes)
    if job is not None:
        return VerbOutput(job_status(job, address, store), show_job)
    return VerbOutput(status_of(place), show_status)


@app.command()
@verb
def submit(
    spec: Spec,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Its dashboard; default RAY_API_SERVER_ADDRESS."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the output, end with the job's exit code.")
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> VerbOutput:
    """Run a job on a Ray cluster. Again: attach to it, or start the next attempt if it ended.

    The token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or `~/.ray/auth_token`.

    Example: `stillhouse submit books.yaml --address http://127.0.0.1:8265 --follow`
    """
    from stillhouse.jobs.submit import run_submit

    again = ["stillhouse", "submit", spec, *(word for s in sets or [] for word in ("--set", s))]
    again += ["--address", address] if address else []
    command = shlex.join([*again, "--follow"])
    result, code = run_submit(
        _load(spec, sets), address, follow=follow, command=command, quiet=as_json
    )

    def show(result: dict[str, Any]) -> None:
        if not follow:
            print(result["job_id"])

    return VerbOutput(result, show, code)


@app.command()
@verb
def schedule(
    spec: Spec,
    cron: Annotated[str, typer.Option(help="Five fields, or @daily.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="raycronjob: a cluster for each run (KubeRay 1.6 or newer); cronjob: submits to "
            "a running cluster; crontab: a line for this machine."
        ),
    ],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Dashboard of a running cluster.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="For Kubernetes: see Dockerfile.")] = None,
    service_account: Annotated[
        str | None, typer.Option(help="For Kubernetes: whose access to the store the pods have.")
    ] = None,
    time_zone: Annotated[
        str | None,
        typer.Option(
            metavar="ZONE",
            help="Of the cron line, such as Europe/Berlin. Default: UTC of a cronjob, the "
            "operator's of a raycronjob (KubeRay 1.6 knows no other).",
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="YAML merged into the manifests: tolerations, secrets, sizes under pod, head, "
            "cpu, gpu, job; see deploy/kubernetes/merge.yaml.",
        ),
    ] = None,
    sets: Sets = None,
) -> VerbOutput:
    """Print what makes a spec run by the clock: manifests for Kubernetes, or a crontab line.

    Example: `stillhouse schedule books.yaml --cron "0 3 * * *" --kind raycronjob
    --image REGISTRY/stillhouse:1 | kubectl apply -f -`
    """
    from stillhouse.jobs.schedule import Place
    from stillhouse.jobs.schedule import schedule as make

    place = Place(address, image, service_account, time_zone, merge)
    text = make(spec, _load(spec, sets), sets or [], cron, kind, place)
    return VerbOutput({"kind": kind, "text": text}, lambda result: print(result["text"], end=""))


@app.command()
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


@app.command()
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


@app.command()
@verb
def report(
    uri: Annotated[str, typer.Argument(help="A run, or its id.", metavar="RUN")],
    store: Store = None,
) -> VerbOutput:
    """Draw a finished run's report again; prints where the page is.

    Example: `stillhouse report store/runs/0123abc...`
    """
    from stillhouse.jobs.ids import resolve
    from stillhouse.jobs.status import draw_report

    page = draw_report(resolve(uri, store, ["runs"]))
    return VerbOutput({"report": page}, lambda result: print(result["report"]))


@app.command()
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
    store: Store = None,
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


@app.command()
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
    store: Store = None,
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


@app.command()
@verb
def recommend(
    runs: Annotated[
        list[str], typer.Argument(help="Records of sweeps, one a task.", metavar="SWEEP_RUN...")
    ],
    features: Annotated[
        str | None,
        typer.Option(help="A YAML file, `RUN: {num_examples: 400}`; `new:` is the new task."),
    ] = None,
    store: Store = None,
) -> VerbOutput:
    """Recommend a setting for a new task, from sweeps over the same settings on at least three.

    Each task is left out once, to tell what a recommendation is worth.

    Example: `stillhouse recommend 0123abcd 4567cdef 89ab0123`
    """
    from stillhouse.jobs.recommend import recommend as find
    from stillhouse.jobs.summary import show_recommendation

    return VerbOutput(find(runs, store, features), show_recommendation)


def main() -> None:
    """Entry point of the `stillhouse` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.argv[1:2] == ["run"] and not process.is_supervised():
        process.supervise()
    try:
        app()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        process.tell_parent(ended=code)
        raise


if __name__ == "__main__":
    main()
